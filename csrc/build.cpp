#include "build.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace gflowgr {
namespace {

constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
constexpr int kDigitBits = 16;

template <class Token>
[[noreturn]] void refuse(const Token* row, std::int64_t index, std::int64_t levels) {
  std::string text = "sequences has the row " + std::to_string(index) + ": [";
  for (std::int64_t level = 0; level < levels; ++level) text += (level ? ", " : "") + std::to_string(row[level]);
  throw std::invalid_argument(text + "], needs tokens, then only -1");
}

template <class Token>
std::vector<std::int32_t> checked_lengths(const Token* rows, std::int64_t items, std::int64_t levels) {
  std::vector<std::int32_t> lengths(items);
  for (std::int64_t item = 0; item < items; ++item) {
    const Token* row = rows + item * levels;
    std::int64_t length = 0;
    while (length < levels && row[length] >= 0) ++length;
    if (length == 0) refuse(row, item, levels);
    for (std::int64_t level = length; level < levels; ++level)
      if (row[level] != -1) refuse(row, item, levels);
    lengths[item] = static_cast<std::int32_t>(length);
  }
  return lengths;
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
TrieArrays build_trie(const Token* rows, std::int64_t items, std::int64_t levels) {
  if (items > kLargest) throw std::length_error("sequences has more than 2**31 - 1 rows");
  const std::vector<std::int32_t> lengths = checked_lengths(rows, items, levels);
  TrieArrays trie;
  trie.item_order = sorted_order(rows, items, levels);

  const auto row_at = [&](std::int64_t rank) { return rows + trie.item_order[rank] * levels; };
  std::vector<std::int32_t> shared(items, 0);
  std::vector<std::int64_t> next(levels + 2, 0);
  for (std::int64_t rank = 0; rank < items; ++rank) {
    const std::int32_t length = lengths[trie.item_order[rank]];
    if (rank > 0) {
      const Token *before = row_at(rank - 1), *row = row_at(rank);
      std::int32_t depth = 0;
      while (depth < length && row[depth] == before[depth]) ++depth;
      shared[rank] = depth;
    }
    for (std::int32_t depth = shared[rank]; depth < length; ++depth) ++next[depth + 2];
  }
  next[1] = 1;
  std::partial_sum(next.begin(), next.end(), next.begin());
  const std::int64_t nodes = next[levels + 1];
  if (nodes > kLargest) throw std::length_error("sequences make a trie of more than 2**31 - 1 nodes");

  trie.first_child.assign(nodes + 1, static_cast<std::int32_t>(nodes));
  trie.token.resize(nodes);
  trie.first_item.resize(nodes);
  trie.item_count.assign(nodes, 0);
  trie.item_node.resize(items);
  // next[d] is the number of the next new node of depth d; open[d] the node of depth d on the current path.
  std::vector<std::int32_t> open(levels + 1, 0);
  const auto close = [&](std::int64_t from, std::int64_t deepest, std::int64_t rank) {
    for (std::int64_t depth = from; depth <= deepest; ++depth)
      trie.item_count[open[depth]] = static_cast<std::int32_t>(rank - trie.first_item[open[depth]]);
  };
  trie.token[0] = -1;
  trie.first_item[0] = 0;
  trie.first_child[0] = 1;
  std::int64_t deepest = 0;
  for (std::int64_t rank = 0; rank < items; ++rank) {
    const std::int64_t item = trie.item_order[rank], length = lengths[item];
    const Token* row = rows + item * levels;
    if (shared[rank] < length || rank == 0) {
      close(shared[rank] + 1, deepest, rank);
      for (std::int64_t depth = shared[rank]; depth < length; ++depth) {
        const std::int64_t node = next[depth + 1]++;
        open[depth + 1] = static_cast<std::int32_t>(node);
        trie.token[node] = static_cast<std::int32_t>(row[depth]);
        trie.first_item[node] = static_cast<std::int32_t>(rank);
        trie.first_child[node] = static_cast<std::int32_t>(depth + 1 < levels ? next[depth + 2] : nodes);
      }
      deepest = length;
    }
    trie.item_node[item] = open[length];
  }
  close(0, deepest, items);
  return trie;
}

template TrieArrays build_trie(const std::int32_t*, std::int64_t, std::int64_t);
template TrieArrays build_trie(const std::int64_t*, std::int64_t, std::int64_t);

}  // namespace gflowgr
