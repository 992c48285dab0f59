// Build, walk and flows of arbitrary catalogues, against an oracle of std::map.
#include <algorithm>
#include <cmath>

#include "catalogue.hpp"

namespace gflowgr::fuzz {
namespace {

template <class Token>
bool builds(const Rows& rows, TrieArrays& arrays) {
  const std::vector<Token> tokens(rows.tokens.begin(), rows.tokens.end());
  try {
    arrays = build_trie(tokens.data(), rows.items, rows.levels);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

void check_build(const Rows& rows, const TrieArrays& arrays, const Oracle& oracle) {
  const Trie trie = view(arrays);
  REQUIRE(trie.nodes == static_cast<std::int64_t>(oracle.items_under.size()));
  const std::vector<Path> paths = paths_of(trie);
  std::size_t depth = 0;
  for (std::int64_t node = 0; node < trie.nodes; ++node) {
    REQUIRE(paths[node].size() >= depth);
    depth = paths[node].size();
    REQUIRE(oracle.has(paths[node]));
    const Children kids = trie.children(node);
    const std::vector<std::int64_t> expected = oracle.children(paths[node]);
    REQUIRE(std::equal(expected.begin(), expected.end(), kids.tokens, kids.tokens + kids.count));
    std::vector<std::int64_t> under(arrays.item_order.begin() + arrays.first_item[node],
                                    arrays.item_order.begin() + arrays.first_item[node] + arrays.item_count[node]);
    const auto at = oracle.items_at.find(paths[node]);
    if (at != oracle.items_at.end()) REQUIRE(std::equal(at->second.begin(), at->second.end(), under.begin()));
    std::sort(under.begin(), under.end());
    REQUIRE(under == oracle.items_under.at(paths[node]));
  }
  for (std::int64_t item = 0; item < rows.items; ++item) {
    bool valid = false;
    REQUIRE(paths[arrays.item_node[item]] == rows.path(item, valid));
  }
}

void check_walk(FuzzedDataProvider& bytes, const Rows& rows, const TrieArrays& arrays, const Oracle& oracle) {
  const Trie trie = view(arrays);
  const std::vector<Path> paths = paths_of(trie);
  const std::int64_t batch = bytes.ConsumeIntegralInRange<int>(0, 4), steps = bytes.ConsumeIntegralInRange<int>(0, 6);
  std::vector<std::int64_t> tokens(batch * steps), start(batch), nodes(batch * steps, -7);
  for (std::int64_t& token : tokens)
    token = bytes.ConsumeBool() ? rows.tokens[bytes.ConsumeIntegralInRange<std::size_t>(0, rows.tokens.size() - 1)]
                                : bytes.ConsumeIntegral<std::int64_t>();
  for (std::int64_t& node : start)
    node = bytes.ConsumeBool() ? bytes.ConsumeIntegralInRange<std::int64_t>(-1, trie.nodes)
                               : bytes.ConsumeIntegral<std::int64_t>();
  walk(trie, tokens.data(), start.data(), batch, steps, nodes.data(), 1);
  for (std::int64_t b = 0; b < batch; ++b) {
    bool on = start[b] >= 0 && start[b] < trie.nodes;
    Path path = on ? paths[start[b]] : Path{};
    for (std::int64_t t = 0; t < steps; ++t) {
      path.push_back(tokens[b * steps + t]);
      on = on && oracle.has(path);
      REQUIRE(on ? paths[nodes[b * steps + t]] == path : nodes[b * steps + t] == -1);
    }
  }
}

void check_flows(FuzzedDataProvider& bytes, const Rows& rows, const TrieArrays& arrays, const Oracle& oracle) {
  const Trie trie = view(arrays);
  const ItemTrie tree{trie, arrays.first_item.data(), arrays.item_count.data(), arrays.item_order.data(), rows.items};
  const std::vector<Path> paths = paths_of(trie);
  std::vector<double> rewards(rows.items), flows(trie.nodes, 7), grad(trie.nodes, 1), back(rows.items, 7);
  const bool tame = bytes.ConsumeBool();
  for (double& reward : rewards)
    reward = tame ? bytes.ConsumeFloatingPointInRange<double>(-50, 50)
                  : std::bit_cast<double>(bytes.ConsumeIntegral<std::uint64_t>());
  log_flows(tree, rewards.data(), 1, flows.data(), 1);
  log_flows_backward(tree, grad.data(), rewards.data(), flows.data(), 1, back.data(), 1);
  for (std::int64_t node = 0; node < trie.nodes; ++node) {
    const std::vector<std::int64_t>& items = oracle.items_under.at(paths[node]);
    double peak = -INFINITY;
    bool has_nan = false;
    for (const std::int64_t item : items) {
      has_nan = has_nan || std::isnan(rewards[item]);
      peak = std::max(peak, rewards[item]);
    }
    if (has_nan) {
      REQUIRE(std::isnan(flows[node]));
      continue;
    }
    if (std::isinf(peak)) {
      REQUIRE(flows[node] == peak);
      continue;
    }
    double total = 0;
    for (const std::int64_t item : items) total += std::exp(rewards[item] - peak);
    REQUIRE(std::abs(flows[node] - (peak + std::log(total))) <= 1e-9 * std::max(1.0, std::abs(peak)));
  }
  if (!tame) return;
  // The gradient of the sum of all flows: an item has a share of every node above it.
  for (std::int64_t item = 0; item < rows.items; ++item) {
    bool valid = false;
    const Path path = rows.path(item, valid);
    double share = 0;
    for (std::int64_t node = 0; node < trie.nodes; ++node)
      if (paths[node].size() <= path.size() && std::equal(paths[node].begin(), paths[node].end(), path.begin()))
        share += std::exp(rewards[item] - flows[node]);
    REQUIRE(std::abs(back[item] - share) <= 1e-9 * std::max(1.0, share));
  }
}

}  // namespace
}  // namespace gflowgr::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace gflowgr;
  using namespace gflowgr::fuzz;
  FuzzedDataProvider bytes(data, size);
  const Rows rows = consume_rows(bytes, 40, 7, 0x7ffffffe);
  TrieArrays wide, narrow;
  const bool built = builds<std::int64_t>(rows, wide);
  REQUIRE(built == all_valid(rows));
  REQUIRE(builds<std::int32_t>(rows, narrow) == built);
  if (!built) return 0;
  REQUIRE(wide.first_child == narrow.first_child && wide.token == narrow.token && wide.item_node == narrow.item_node);
  const Oracle oracle(rows);
  check_build(rows, wide, oracle);
  check_walk(bytes, rows, wide, oracle);
  check_flows(bytes, rows, wide, oracle);
  return 0;
}
