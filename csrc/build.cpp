#include "build.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace gflowgr {
namespace {

constexpr int kDigitBits = 16;

template <class Token>
[[noreturn]] void refuse(const Token* row, std::int64_t index, std::int64_t levels) {
  std::string text = "sequences has the row " + std::to_string(index) + ": [";
  for (std::int64_t level = 0; level < levels; ++level) text += (level ? ", " : "") + std::to_string(row[level]);
  throw std::invalid_argument(text + "], needs tokens, then only -1");
}

// Sets the lengths and the largest token of `rows`.
template <class Token>
void check(Rows<Token>& rows, std::int64_t items) {
  rows.lengths.resize(items);
  rows.largest = 0;
  for (std::int64_t item = 0; item < items; ++item) {
    const Token* row = rows.data + item * rows.levels;
    std::int64_t length = 0;
    for (; length < rows.levels && row[length] >= 0; ++length)
      rows.largest = std::max<std::int64_t>(rows.largest, row[length]);
    if (length == 0) refuse(row, item, rows.levels);
    for (std::int64_t level = length; level < rows.levels; ++level)
      if (row[level] != -1) refuse(row, item, rows.levels);
    rows.lengths[item] = static_cast<std::int32_t>(length);
  }
}

// One stable counting sort of `order` by a digit of each row's token at `level`; the padding sorts first.
template <class Token>
void sort_by_digit(const Token* rows, std::int64_t items, std::int64_t levels, std::int64_t level,
                   std::int64_t smallest, int shift, std::size_t buckets, std::vector<std::int32_t>& order,
                   std::vector<std::int32_t>& scratch) {
  const auto digit = [&](std::int64_t item) {
    const std::int64_t token = rows[item * levels + level];
    const std::uint64_t key = token < 0 ? 0 : static_cast<std::uint64_t>(token - smallest + 1);
    return static_cast<std::size_t>(key >> shift) & (buckets - 1);
  };
  std::vector<std::int32_t> place(buckets + 1, 0);
  for (std::int64_t item = 0; item < items; ++item) ++place[digit(item) + 1];
  std::partial_sum(place.begin(), place.end(), place.begin());
  for (const std::int32_t item : order) scratch[place[digit(item)]++] = item;
  order.swap(scratch);
}

template <class Token>
std::vector<std::int32_t> sorted_order(const Token* rows, std::int64_t items, std::int64_t levels) {
  std::vector<std::int32_t> order(items), scratch(items);
  std::iota(order.begin(), order.end(), 0);
  for (std::int64_t level = levels - 1; level >= 0; --level) {
    std::int64_t smallest = kLargest, largest = -1;
    for (std::int64_t item = 0; item < items; ++item) {
      const std::int64_t token = rows[item * levels + level];
      if (token < 0) continue;
      smallest = std::min(smallest, token);
      largest = std::max(largest, token);
    }
    if (largest < 0) continue;
    const std::uint64_t top = static_cast<std::uint64_t>(largest - smallest + 1);
    for (int shift = 0; shift < 64 && (top >> shift) > 0; shift += kDigitBits) {
      std::size_t buckets = 2;
      while (buckets <= (top >> shift) && buckets < (std::size_t{1} << kDigitBits)) buckets *= 2;
      sort_by_digit(rows, items, levels, level, smallest, shift, buckets, order, scratch);
    }
  }
  return order;
}

}  // namespace

template <class Token>
Rows<Token> sorted_rows(const Token* data, std::int64_t items, std::int64_t levels) {
  if (items > kLargest) throw std::length_error("sequences has more than 2**31 - 1 rows");
  Rows<Token> rows{data, levels, {}, {}, 0};
  check(rows, items);
  rows.order = sorted_order(data, items, levels);
  return rows;
}

template <class Token>
TrieArrays build_trie(const Token* data, std::int64_t items, std::int64_t levels) {
  const Rows<Token> rows = sorted_rows(data, items, levels);
  std::vector<std::int32_t> shared(items);
  // next[d] is the number of the next new node of depth d, place[d] the rank of the next item that ends there.
  std::vector<std::int64_t> next(levels + 2, 0), place(levels + 2, 0);
  for (std::int64_t rank = 0; rank < items; ++rank) {
    shared[rank] = static_cast<std::int32_t>(rows.shared(rank));
    for (std::int64_t depth = shared[rank]; depth < rows.length(rank); ++depth) ++next[depth + 2];
    ++place[rows.length(rank) + 1];
  }
  next[1] = 1;
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::partial_sum(place.begin(), place.end(), place.begin());
  const std::int64_t nodes = next[levels + 1];
  if (nodes > kLargest) throw std::length_error("sequences make a trie of more than 2**31 - 1 nodes");

  TrieArrays trie{Buffer<std::int32_t>(nodes + 1), TokenBuffer(nodes, rows.largest <= kLargestNarrow),
                  Buffer<std::int32_t>(items), Buffer<std::int32_t>(items)};
  // open[d] is the node of depth d on the current path.
  std::vector<std::int32_t> open(levels + 1, 0);
  trie.first_child[0] = 1;
  trie.first_child[nodes] = static_cast<std::int32_t>(nodes);
  for (std::int64_t rank = 0; rank < items; ++rank) {
    const std::int64_t length = rows.length(rank);
    const Token* row = rows.in_order(rank);
    for (std::int64_t depth = shared[rank]; depth < length; ++depth) {
      const std::int64_t node = next[depth + 1]++;
      open[depth + 1] = static_cast<std::int32_t>(node);
      trie.token.set(node, row[depth]);
      trie.first_child[node] = static_cast<std::int32_t>(depth + 1 < levels ? next[depth + 2] : nodes);
    }
    trie.item_node[rows.order[rank]] = open[length];
    trie.node_items[place[length]++] = rows.order[rank];
  }
  return trie;
}

std::vector<std::int64_t> level_offsets_of(const Trie& trie) {
  std::vector<std::int64_t> offsets{0, 1};
  while (offsets.back() < trie.nodes) offsets.push_back(trie.first_child[offsets.back()]);
  return offsets;
}

Levels levels_of(const Trie& trie) {
  Levels levels;
  levels.offsets = level_offsets_of(trie);
  for (std::size_t depth = 0; depth + 2 < levels.offsets.size(); ++depth) {
    std::int32_t most = 0, smallest = kLargest, largest = 0;
    for (std::int64_t node = levels.offsets[depth]; node < levels.offsets[depth + 1]; ++node)
      most = std::max(most, trie.first_child[node + 1] - trie.first_child[node]);
    for (std::int64_t node = levels.offsets[depth + 1]; node < levels.offsets[depth + 2]; ++node) {
      smallest = std::min(smallest, trie.token[node]);
      largest = std::max(largest, trie.token[node]);
    }
    levels.most_children.push_back(most);
    levels.smallest_token.push_back(smallest);
    levels.largest_token.push_back(largest);
  }
  return levels;
}

template Rows<std::int32_t> sorted_rows(const std::int32_t*, std::int64_t, std::int64_t);
template Rows<std::int64_t> sorted_rows(const std::int64_t*, std::int64_t, std::int64_t);
template TrieArrays build_trie(const std::int32_t*, std::int64_t, std::int64_t);
template TrieArrays build_trie(const std::int64_t*, std::int64_t, std::int64_t);

}  // namespace gflowgr
