// The policy on arbitrary logits (NaN and infinities among them) of every dtype, against sums in long double.
#include <bit>
#include <cmath>
#include <memory>

#include "balance.hpp"
#include "catalogue.hpp"

namespace gflowgr::fuzz {
namespace {

double tolerance(float) { return 2e-5; }
double tolerance(double) { return 1e-12; }

template <class T>
T from_bits(FuzzedDataProvider& bytes) {
  if constexpr (sizeof(T) == 8)
    return std::bit_cast<T>(bytes.ConsumeIntegral<std::uint64_t>());
  else if constexpr (sizeof(T) == 4)
    return std::bit_cast<T>(bytes.ConsumeIntegral<std::uint32_t>());
  else
    return std::bit_cast<T>(bytes.ConsumeIntegral<std::uint16_t>());
}

template <class T>
T consume_logit(FuzzedDataProvider& bytes, bool tame) {
  return tame ? narrow<T>(bytes.ConsumeIntegralInRange<int>(-4000, 4000) / 100.0) : from_bits<T>(bytes);
}

// What one row's distribution over the children has to be.
struct Expected {
  bool plain = true;  // no NaN, and a finite largest logit
  std::vector<long double> log_probs;

  template <class Read>
  Expected(const Children& kids, const Read& logit) {
    long double peak = -INFINITY, total = 0;
    for (std::int64_t child = 0; child < kids.count; ++child) {
      const long double value = logit(kids.tokens[child]);
      plain = plain && !std::isnan(value);
      peak = std::max(peak, value);
      log_probs.push_back(value);
    }
    plain = plain && std::isfinite(peak);
    if (kids.count == 1) {
      plain = true;
      log_probs = {0};
      return;
    }
    for (const long double value : log_probs) total += std::exp(value - peak);
    for (long double& value : log_probs) value = (value - peak) - std::log(total);
  }

  template <class S>
  bool agrees(std::int64_t child, S found) const {
    if (!plain) return true;
    const long double wanted = log_probs[child];
    // Logits so far apart that their difference overflows the type.
    if (std::isinf(found)) return found < 0 && wanted < -std::numeric_limits<S>::max() / 4;
    return std::abs(wanted - found) <= tolerance(S{}) * std::max<long double>(1, std::abs(wanted));
  }
};

template <class T>
void check(FuzzedDataProvider& bytes, const Trie& trie, std::int64_t largest_token) {
  using S = Sum<T>;
  const std::int64_t batch = bytes.ConsumeIntegralInRange<int>(0, 3), steps = bytes.ConsumeIntegralInRange<int>(0, 4);
  const std::int64_t width = largest_token + 1 + bytes.ConsumeIntegralInRange<int>(0, 2);
  const std::int64_t token_stride = bytes.ConsumeIntegralInRange<int>(0, 2);
  const std::int64_t row_size = token_stride * (width - 1) + 1;
  const bool tame = bytes.ConsumeBool();
  // On the heap and of the exact size, so that a read past either end is seen.
  std::vector<T> values(batch * steps * row_size);
  for (T& value : values) value = consume_logit<T>(bytes, tame);
  values.shrink_to_fit();
  const Logits<T> logits{values.data(), batch, steps, width, steps * row_size, row_size, token_stride, 0};
  const auto logit = [&](std::int64_t row, std::int64_t token) {
    return static_cast<long double>(widen(values[row * row_size + token * token_stride]));
  };

  const std::int64_t rows = batch * steps;
  std::vector<std::int64_t> nodes(rows), tokens(rows), start(batch), drawn(rows), reached(rows);
  std::vector<double> uniform(rows);
  for (std::int64_t& node : nodes) node = bytes.ConsumeIntegralInRange<std::int64_t>(-1, trie.nodes);
  for (std::int64_t& token : tokens) token = bytes.ConsumeIntegralInRange<std::int64_t>(-1, largest_token + 1);
  for (std::int64_t& node : start) node = bytes.ConsumeBool() ? 0 : bytes.ConsumeIntegralInRange<int>(-1, trie.nodes);
  for (double& u : uniform)
    u = bytes.ConsumeBool() ? std::nextafter(1.0, 0.0) : bytes.ConsumeFloatingPointInRange<double>(0, 0.999);

  std::vector<S> dense(rows * width), paths(rows), grad(rows * width, 1), path_grad(rows, 1), draw_log_probs(rows);
  std::vector<T> back(rows * width, narrow<T>(0)), path_back(rows * width, narrow<T>(0));
  log_softmax(trie, logits, nodes.data(), dense.data(), 1);
  const Logits<S> contiguous{grad.data(), batch, steps, width, steps * width, width, 1, 0};
  log_softmax_backward<T>(trie, contiguous, dense.data(), nodes.data(), back.data(), 1);
  const double temperature = bytes.ConsumeBool() ? 1.0 : bytes.ConsumeFloatingPointInRange<double>(1e-3, 100);
  sample(trie, logits, nodes.data(), uniform.data(), temperature, drawn.data(), reached.data(), draw_log_probs.data(),
         1);
  for (std::int64_t row = 0; row < rows; ++row) {
    const Children kids = trie.children(nodes[row]);
    const Expected expected(kids, [&](std::int64_t token) { return logit(row, token); });
    std::int64_t child = 0;
    for (std::int64_t token = 0; token < width; ++token) {
      const S found = dense[row * width + token];
      if (child < kids.count && kids.tokens[child] == token)
        REQUIRE(expected.agrees(child++, found));
      else
        REQUIRE(found == -std::numeric_limits<S>::infinity());
    }
    REQUIRE(child == kids.count);
    if (kids.count == 0) {
      REQUIRE(drawn[row] == -1 && reached[row] == -1 && draw_log_probs[row] == 0);
      continue;
    }
    const std::int64_t chosen = reached[row] - kids.first;
    REQUIRE(chosen >= 0 && chosen < kids.count && kids.tokens[chosen] == drawn[row]);
    REQUIRE(expected.agrees(chosen, draw_log_probs[row]));
    // What has no probability in the type is never drawn.
    if (expected.plain && tame) REQUIRE(dense[row * width + drawn[row]] > -std::numeric_limits<S>::infinity());
  }

  token_log_probs(trie, logits, tokens.data(), start.data(), paths.data(), 1);
  token_log_probs_backward(trie, logits, tokens.data(), start.data(), path_grad.data(), path_back.data(), 1);
  for (std::int64_t b = 0; b < batch; ++b) {
    std::int64_t node = start[b];
    bool padding = false;
    for (std::int64_t row = b * steps; row < (b + 1) * steps; ++row) {
      padding = padding || tokens[row] < 0;
      if (padding) {
        REQUIRE(paths[row] == 0);
        continue;
      }
      const Children kids = trie.children(node);
      const std::int32_t* hit = std::find(kids.tokens, kids.tokens + kids.count, tokens[row]);
      if (hit == kids.tokens + kids.count) {
        REQUIRE(paths[row] == -std::numeric_limits<S>::infinity());
        node = -1;
        continue;
      }
      const Expected expected(kids, [&](std::int64_t token) { return logit(row, token); });
      REQUIRE(expected.agrees(hit - kids.tokens, paths[row]));
      long double sum = 0;
      for (std::int64_t token = 0; token < width; ++token) {
        const long double share = widen(path_back[row * width + token]);
        if (std::find(kids.tokens, kids.tokens + kids.count, token) == kids.tokens + kids.count || kids.count == 1)
          REQUIRE(share == 0);
        sum += share;
      }
      // The gradient of a softmax sums to nothing.
      if (expected.plain && tame) REQUIRE(std::abs(sum) <= (sizeof(T) == 2 ? 2e-2 : 1e-4));
      node = kids.first + (hit - kids.tokens);
    }
  }
}

}  // namespace
}  // namespace gflowgr::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace gflowgr;
  using namespace gflowgr::fuzz;
  FuzzedDataProvider bytes(data, size);
  const std::int64_t largest = bytes.ConsumeIntegralInRange<int>(0, 40);
  const Rows rows = consume_rows(bytes, 60, 4, largest);
  if (!all_valid(rows)) return 0;
  const TrieArrays arrays = build_trie(rows.tokens.data(), rows.items, rows.levels);
  dispatch(static_cast<Dtype>(bytes.ConsumeIntegralInRange<int>(0, 3)),
           [&]<class T>(T*) { check<T>(bytes, view(arrays), largest); });
  return 0;
}
