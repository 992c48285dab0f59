#pragma once

#include <cstdint>
#include <vector>

#include "trie.hpp"

// From lists of items to what `ItemFilter` reads, in time that grows with the lists and the trie's depth.
namespace gflowgr {

// The items of a catalogue by the nodes at which they end, and those nodes; -1 for an item that was removed.
struct EndingItems {
  struct Range {
    const std::int32_t* begin;
    std::int64_t count;
  };

  Trie trie;
  const std::int32_t* first_item;
  const std::int32_t* item_count;
  const std::int32_t* item_order;
  const std::int32_t* item_node;
  std::int64_t items;

  // The items that end exactly at `node`.
  Range at(std::int64_t node) const {
    const std::int64_t child = trie.first_child[node];
    const bool leaf = child == trie.first_child[node + 1];
    return {item_order + first_item[node], leaf ? item_count[node] : first_item[child] - first_item[node]};
  }
};

// Bits, 32 a word, of the items of one set and of the nodes at or above them.
struct AllowedSet {
  std::int32_t* items;
  std::int32_t* nodes;
};

// Sets the bits of `members`, and of the nodes at or above their ends; all bits are 0 before.
void allow(const EndingItems& ending, const std::int64_t* members, std::int64_t count, const AllowedSet& set);

struct HiddenNodes {
  std::vector<std::int64_t> offsets;
  std::vector<std::int32_t> nodes;
};

// For each row, ascending: the nodes with excluded items at or under them and no other items that the row may get.
// `excluded` holds row * items + item, ascending and without repeats, row b's from offsets[b] on. `sets[b]` is what
// row b may get; null where that is everything.
HiddenNodes hidden_nodes(const EndingItems& ending, const std::int64_t* offsets, const std::int64_t* excluded,
                         std::int64_t rows, const std::vector<AllowedSet>* sets, int threads);

}  // namespace gflowgr
