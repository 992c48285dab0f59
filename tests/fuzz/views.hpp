#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "build.hpp"
#include "flows.hpp"

// Built arrays as the core reads them, compared, and the ranges of items that flows read, from item_node alone.
namespace gflowgr::fuzz {

inline Trie view(const TrieArrays& arrays) {
  return {arrays.first_child.data(), arrays.token.tokens(), arrays.first_child.size() - 1};
}

inline Catalogue catalogue(const TrieArrays& arrays) {
  return {view(arrays), arrays.item_node.data(), arrays.node_items.data(), arrays.item_node.size(),
          arrays.node_items.size()};
}

template <class T>
bool same(const Buffer<T>& a, const Buffer<T>& b) {
  return std::equal(a.data(), a.data() + a.size(), b.data(), b.data() + b.size());
}

inline bool same_nodes(const TrieArrays& a, const TrieArrays& b) {
  if (!same(a.first_child, b.first_child) || a.token.is_narrow() != b.token.is_narrow()) return false;
  const Tokens tokens = a.token.tokens(), others = b.token.tokens();
  for (std::int64_t node = 0; node < view(a).nodes; ++node)
    if (tokens[node] != others[node]) return false;
  return true;
}

inline bool same(const TrieArrays& a, const TrieArrays& b) {
  return same_nodes(a, b) && same(a.item_node, b.item_node) && same(a.node_items, b.node_items);
}

struct ItemRanges {
  std::vector<std::int32_t> first_item, item_count, item_order;

  explicit ItemRanges(const TrieArrays& arrays)
      : first_item(view(arrays).nodes), item_count(first_item.size()), item_order(arrays.node_items.size()) {
    const Trie trie = view(arrays);
    std::vector<std::vector<std::int32_t>> own(trie.nodes);
    for (std::int64_t item = 0; item < arrays.item_node.size(); ++item)
      if (const std::int32_t node = arrays.item_node.data()[item]; node >= 0)
        own[node].push_back(static_cast<std::int32_t>(item));
    for (std::int64_t node = trie.nodes - 1; node >= 0; --node) {
      item_count[node] = static_cast<std::int32_t>(own[node].size());
      const Children kids = trie.children(node);
      for (std::int64_t child = 0; child < kids.count; ++child) item_count[node] += item_count[kids.first + child];
    }
    for (std::int64_t node = 0; node < trie.nodes; ++node) {
      std::copy(own[node].begin(), own[node].end(), item_order.begin() + first_item[node]);
      std::int32_t next = first_item[node] + static_cast<std::int32_t>(own[node].size());
      const Children kids = trie.children(node);
      for (std::int64_t child = 0; child < kids.count; ++child) {
        first_item[kids.first + child] = next;
        next += item_count[kids.first + child];
      }
    }
  }

  ItemTrie tree(const TrieArrays& arrays) const {
    return {view(arrays), first_item.data(), item_count.data(), item_order.data(), arrays.item_node.size()};
  }
};

}  // namespace gflowgr::fuzz
