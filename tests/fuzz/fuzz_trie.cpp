// Build, walk and flows of arbitrary catalogues, against an oracle of std::map.
#include <algorithm>
#include <cmath>

#include "catalogue.hpp"

namespace gflowgr::fuzz {
namespace {

template <class Token>
bool builds(const Sequences& rows, TrieArrays& arrays) {
  const std::vector<Token> tokens(rows.tokens.begin(), rows.tokens.end());
  try {
    arrays = build_trie(tokens.data(), rows.items, rows.levels);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

void check_build(const Sequences& rows, const TrieArrays& arrays, const Oracle& oracle) {
  const Trie trie = view(arrays);
  REQUIRE(trie.nodes == static_cast<std::int64_t>(oracle.items_under.size()));
  const std::vector<Path> paths = paths_of(trie);
  std::size_t depth = 0;
  std::int64_t before = 0;
  for (std::int64_t node = 0; node < trie.nodes; ++node) {
    REQUIRE(paths[node].size() >= depth);
    depth = paths[node].size();
    REQUIRE(oracle.has(paths[node]));
    const Children kids = trie.children(node);
    const std::vector<std::int64_t> expected = oracle.children(paths[node]);
    REQUIRE(kids.count == std::ssize(expected));
    for (std::int64_t child = 0; child < kids.count; ++child) REQUIRE(kids.tokens[child] == expected[child]);
    const auto at = oracle.items_at.find(paths[node]);
    const std::vector<std::int64_t> ending = at == oracle.items_at.end() ? std::vector<std::int64_t>{} : at->second;
    const Catalogue::Ending found = catalogue(arrays).ending_at(node);
    REQUIRE(std::equal(ending.begin(), ending.end(), found.begin, found.begin + found.count));
    REQUIRE(found.begin == arrays.node_items.data() + before);
    before += found.count;
  }
  REQUIRE(before == rows.items && arrays.item_node.size() == rows.items && arrays.node_items.size() == rows.items);
  for (std::int64_t item = 0; item < rows.items; ++item) {
    bool valid = false;
    REQUIRE(paths[arrays.item_node.data()[item]] == rows.path(item, valid));
  }
}

void check_levels(const TrieArrays& arrays) {
  const Trie trie = view(arrays);
  const std::vector<Path> paths = paths_of(trie);
  const Levels levels = levels_of(trie);
  REQUIRE(levels.offsets.back() == trie.nodes);
  REQUIRE(levels.offsets.size() == paths.back().size() + 2);
  std::int64_t largest_of_all = 0;
  for (std::size_t depth = 0; depth < paths.back().size(); ++depth) {
    std::int64_t first = trie.nodes, most = 0, smallest = kLargest, largest = 0;
    for (std::int64_t node = 0; node < trie.nodes; ++node) {
      if (paths[node].size() == depth) {
        first = std::min(first, node);
        most = std::max(most, trie.children(node).count);
      } else if (paths[node].size() == depth + 1) {
        smallest = std::min(smallest, paths[node].back());
        largest = std::max(largest, paths[node].back());
      }
    }
    REQUIRE(levels.offsets[depth] == first && levels.most_children[depth] == most);
    REQUIRE(levels.smallest_token[depth] == smallest && levels.largest_token[depth] == largest);
    largest_of_all = std::max(largest_of_all, largest);
  }
  REQUIRE(arrays.token.is_narrow() == (largest_of_all <= kLargestNarrow));
}

void check_walk(FuzzedDataProvider& bytes, const Sequences& rows, const TrieArrays& arrays, const Oracle& oracle) {
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

void check_flows(FuzzedDataProvider& bytes, const Sequences& rows, const TrieArrays& arrays, const Oracle& oracle) {
  const Trie trie = view(arrays);
  const ItemRanges ranges(arrays);
  const ItemTrie tree = ranges.tree(arrays);
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
  const Sequences rows = consume_rows(bytes, 40, 7, 0x7ffffffe);
  TrieArrays arrays, of_int32;
  const bool built = builds<std::int64_t>(rows, arrays);
  REQUIRE(built == all_valid(rows));
  REQUIRE(builds<std::int32_t>(rows, of_int32) == built);
  if (!built) return 0;
  REQUIRE(same(arrays, of_int32));
  const Oracle oracle(rows);
  check_build(rows, arrays, oracle);
  check_levels(arrays);
  check_walk(bytes, rows, arrays, oracle);
  check_flows(bytes, rows, arrays, oracle);
  return 0;
}
