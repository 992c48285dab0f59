#pragma once

#include <cstdint>
#include <vector>

namespace gflowgr {

struct TrieArrays {
  std::vector<std::int32_t> first_child, token, first_item, item_count, item_order, item_node;
};

// Builds the trie of `items` rows of `levels` tokens each (row major, -1 pads tails).
// Throws std::invalid_argument that names the first bad row, std::length_error past 2^31 - 1 nodes or items.
template <class Token>
TrieArrays build_trie(const Token* rows, std::int64_t items, std::int64_t levels);

extern template TrieArrays build_trie(const std::int32_t*, std::int64_t, std::int64_t);
extern template TrieArrays build_trie(const std::int64_t*, std::int64_t, std::int64_t);

}  // namespace gflowgr
