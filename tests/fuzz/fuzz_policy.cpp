// The policy on arbitrary logits (NaN and infinities among them) of every dtype, with filters of items and without,
// against sums in long double over children found by brute force.
#include <bit>
#include <cmath>
#include <memory>

#include "balance.hpp"
#include "catalogue.hpp"
#include "filter_build.hpp"

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

// The catalogue of `rows`, of which some items may have been removed.
TrieArrays consume_catalogue(FuzzedDataProvider& bytes, const Sequences& rows) {
  TrieArrays arrays = build_trie(rows.tokens.data(), rows.items, rows.levels);
  std::vector<std::int64_t> removed;
  if (bytes.ConsumeBool())
    for (std::int64_t item = 0; item < rows.items; ++item)
      if (bytes.ConsumeIntegralInRange<int>(0, 2) == 0) removed.push_back(item);
  if (std::ssize(removed) == rows.items) removed.pop_back();
  return removed.empty() ? std::move(arrays) : remove_items(catalogue(arrays), removed.data(), std::ssize(removed));
}

// Which items each row of a batch may get, and the filter made of that.
class Wishes {
 public:
  Wishes(FuzzedDataProvider& bytes, const TrieArrays& arrays, std::int64_t batch)
      : trie_(view(arrays)), ranges_(arrays) {
    const std::int64_t items = arrays.item_node.size();
    const bool sets = bytes.ConsumeBool();
    const std::int64_t num_sets = sets ? bytes.ConsumeIntegralInRange<int>(1, 3) : 0;
    words_ = (trie_.nodes + 31) / 32;
    allowed_.assign(num_sets * words_, 0);
    std::vector<std::int32_t> item_words(num_sets * ((items + 31) / 32), 0);
    std::vector<std::vector<bool>> members(num_sets, std::vector<bool>(items, false));
    const Catalogue all = catalogue(arrays);
    for (std::int64_t set = 0; set < num_sets; ++set) {
      std::vector<std::int64_t> chosen;
      for (int i = bytes.ConsumeIntegralInRange<int>(0, 12); i > 0; --i) {
        chosen.push_back(bytes.ConsumeIntegralInRange<std::int64_t>(0, items - 1));
        members[set][chosen.back()] = true;
      }
      bits_.push_back({item_words.data() + set * ((items + 31) / 32), allowed_.data() + set * words_});
      allow(all, chosen.data(), chosen.size(), bits_[set]);
    }
    std::vector<std::int64_t> offsets{0}, excluded;
    std::vector<AllowedSet> of_row;
    for (std::int64_t b = 0; b < batch; ++b) {
      set_of_row_.push_back(num_sets ? bytes.ConsumeIntegralInRange<std::int64_t>(0, num_sets - 1) : 0);
      if (num_sets) of_row.push_back(bits_[set_of_row_[b]]);
      left_.push_back(num_sets ? members[set_of_row_[b]] : std::vector<bool>(items, true));
      const int density = bytes.ConsumeIntegralInRange<int>(0, 4);
      for (std::int64_t item = 0; item < items; ++item)
        if (density > 0 && bytes.ConsumeIntegralInRange<int>(0, 4) < density) {
          excluded.push_back(b * items + item);
          left_[b][item] = false;
        }
      offsets.push_back(excluded.size());
    }
    hidden_ = hidden_nodes(all, offsets.data(), excluded.data(), batch, num_sets ? &of_row : nullptr, 1);
    filter_ = {hidden_.offsets.data(),
               hidden_.nodes.data(),
               num_sets ? allowed_.data() : nullptr,
               set_of_row_.data(),
               batch,
               words_};
  }

  const ItemFilter& filter() const { return filter_; }

  std::vector<std::int64_t> children(std::int64_t b, std::int64_t node) const {
    std::vector<std::int64_t> kids;
    if (node < 0 || node >= trie_.nodes) return kids;
    for (std::int64_t child = trie_.first_child[node]; child < trie_.first_child[node + 1]; ++child) {
      bool available = false;
      for (std::int64_t i = 0; i < ranges_.item_count[child]; ++i)
        available = available || left_[b][ranges_.item_order[ranges_.first_item[child] + i]];
      if (available) kids.push_back(child);
    }
    return kids;
  }

 private:
  Trie trie_;
  ItemRanges ranges_;
  std::int64_t words_;
  std::vector<std::int32_t> allowed_;
  std::vector<AllowedSet> bits_;
  std::vector<std::int64_t> set_of_row_;
  std::vector<std::vector<bool>> left_;
  HiddenNodes hidden_;
  ItemFilter filter_;
};

struct Everything {
  Trie trie;

  NoFilter filter() const { return {}; }
  std::vector<std::int64_t> children(std::int64_t, std::int64_t node) const {
    std::vector<std::int64_t> kids;
    if (node < 0 || node >= trie.nodes) return kids;
    for (std::int64_t child = trie.first_child[node]; child < trie.first_child[node + 1]; ++child)
      kids.push_back(child);
    return kids;
  }
};

// What one row's distribution over the available children has to be.
struct Expected {
  bool plain = true;  // no NaN, and a finite largest logit
  std::vector<long double> log_probs;

  template <class Read>
  Expected(const Trie& trie, const std::vector<std::int64_t>& kids, const Read& logit) {
    long double peak = -INFINITY, total = 0;
    for (const std::int64_t child : kids) {
      const long double value = logit(trie.token[child]);
      plain = plain && !std::isnan(value);
      peak = std::max(peak, value);
      log_probs.push_back(value);
    }
    plain = plain && std::isfinite(peak);
    if (kids.size() == 1) {
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

template <class T, class Available>
void check(FuzzedDataProvider& bytes, const Trie& trie, const Available& available, std::int64_t batch,
           std::int64_t largest_token) {
  using S = Sum<T>;
  const auto filter = available.filter();
  const std::int64_t steps = bytes.ConsumeIntegralInRange<int>(0, 4);
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
  log_softmax(trie, filter, logits, nodes.data(), dense.data(), 1);
  const Logits<S> contiguous{grad.data(), batch, steps, width, steps * width, width, 1, 0};
  log_softmax_backward<T>(trie, filter, contiguous, dense.data(), nodes.data(), back.data(), 1);
  const double temperature = bytes.ConsumeBool() ? 1.0 : bytes.ConsumeFloatingPointInRange<double>(1e-3, 100);
  sample(trie, filter, logits, nodes.data(), uniform.data(), temperature, drawn.data(), reached.data(),
         draw_log_probs.data(), 1);
  const std::int64_t places = bytes.ConsumeIntegralInRange<int>(1, 8);
  std::vector<S> by_child(rows * places), child_grad(rows * places, 1);
  std::vector<T> child_back(rows * width, narrow<T>(0));
  child_log_probs(trie, filter, logits, nodes.data(), places, by_child.data(), 1);
  child_log_probs_backward(trie, filter, logits, nodes.data(), places, child_grad.data(), child_back.data(), 1);
  constexpr S kNever = -std::numeric_limits<S>::infinity();
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::vector<std::int64_t> kids = available.children(row / steps, nodes[row]);
    const Expected expected(trie, kids, [&](std::int64_t token) { return logit(row, token); });
    std::size_t child = 0;
    for (std::int64_t token = 0; token < width; ++token) {
      const S found = dense[row * width + token];
      if (child < kids.size() && trie.token[kids[child]] == token)
        REQUIRE(expected.agrees(child++, found));
      else
        REQUIRE(found == kNever);
    }
    REQUIRE(child == kids.size());
    const std::int64_t first = trie.children(nodes[row]).first;
    child = 0;
    for (std::int64_t place = 0; place < places; ++place) {
      const S found = by_child[row * places + place];
      if (child < kids.size() && kids[child] == first + place)
        REQUIRE(expected.agrees(child++, found));
      else
        REQUIRE(found == kNever);
    }
    if (kids.empty()) {
      REQUIRE(drawn[row] == -1 && reached[row] == -1 && draw_log_probs[row] == 0);
      continue;
    }
    const auto chosen = std::find(kids.begin(), kids.end(), reached[row]);
    REQUIRE(chosen != kids.end() && trie.token[*chosen] == drawn[row]);
    REQUIRE(expected.agrees(chosen - kids.begin(), draw_log_probs[row]));
    // What has no probability in the type is never drawn.
    if (expected.plain && tame) REQUIRE(dense[row * width + drawn[row]] > kNever);
  }

  token_log_probs(trie, filter, logits, tokens.data(), start.data(), paths.data(), 1);
  token_log_probs_backward(trie, filter, logits, tokens.data(), start.data(), path_grad.data(), path_back.data(), 1);
  for (std::int64_t b = 0; b < batch; ++b) {
    std::int64_t node = start[b];
    bool padding = false;
    for (std::int64_t row = b * steps; row < (b + 1) * steps; ++row) {
      padding = padding || tokens[row] < 0;
      if (padding) {
        REQUIRE(paths[row] == 0);
        continue;
      }
      const std::vector<std::int64_t> kids = available.children(b, node);
      std::size_t hit = 0;
      while (hit < kids.size() && trie.token[kids[hit]] != tokens[row]) ++hit;
      if (hit == kids.size()) {
        REQUIRE(paths[row] == kNever);
        // Where items under a node are all filtered it is still a node: what follows is judged from there.
        node = trie.step(node, tokens[row]);
        continue;
      }
      const Expected expected(trie, kids, [&](std::int64_t token) { return logit(row, token); });
      REQUIRE(expected.agrees(hit, paths[row]));
      long double sum = 0;
      for (std::int64_t token = 0; token < width; ++token) {
        const long double share = widen(path_back[row * width + token]);
        const bool is_child =
            std::any_of(kids.begin(), kids.end(), [&](std::int64_t child) { return trie.token[child] == token; });
        if (!is_child || kids.size() == 1) REQUIRE(share == 0);
        sum += share;
      }
      // The gradient of a softmax sums to nothing.
      if (expected.plain && tame) REQUIRE(std::abs(sum) <= (sizeof(T) == 2 ? 2e-2 : 1e-4));
      node = kids[hit];
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
  const Sequences rows = consume_rows(bytes, 60, 4, largest);
  if (!all_valid(rows)) return 0;
  const TrieArrays arrays = consume_catalogue(bytes, rows);
  const Trie trie = view(arrays);
  const std::int64_t batch = bytes.ConsumeIntegralInRange<int>(0, 3);
  dispatch(static_cast<Dtype>(bytes.ConsumeIntegralInRange<int>(0, 3)), [&]<class T>(T*) {
    if (bytes.ConsumeBool())
      check<T>(bytes, trie, Wishes(bytes, arrays, batch), batch, largest);
    else
      check<T>(bytes, trie, Everything{trie}, batch, largest);
  });
  return 0;
}
