#pragma once

#include <cstdint>

namespace gflowgr {

// Tokens on the edges into consecutive nodes, in 16 bits where all of a trie's fit, else in 32.
class Tokens {
 public:
  explicit Tokens(const std::uint16_t* narrow) : narrow_(narrow), wide_(nullptr) {}
  explicit Tokens(const std::int32_t* wide) : narrow_(nullptr), wide_(wide) {}

  std::int32_t operator[](std::int64_t index) const { return narrow_ != nullptr ? narrow_[index] : wide_[index]; }
  Tokens from(std::int64_t index) const { return narrow_ != nullptr ? Tokens(narrow_ + index) : Tokens(wide_ + index); }
  bool is_narrow() const { return narrow_ != nullptr; }
  template <class Token>
  void copy_to(Token* out, std::int64_t count) const {
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<Token>((*this)[i]);
  }

 private:
  const std::uint16_t* narrow_;
  const std::int32_t* wide_;
};

// The children of a node: the nodes first .. first + count - 1, and their tokens, ascending.
struct Children {
  Tokens tokens;
  std::int64_t first;
  std::int64_t count;

  // How many have a token below `wanted`.
  std::int64_t below(std::int64_t wanted) const {
    std::int64_t low = 0, left = count;
    while (left > 0) {
      const std::int64_t half = left / 2;
      const bool more = tokens[low + half] < wanted;
      low += more ? half + 1 : 0;
      left = more ? left - half - 1 : half;
    }
    return low;
  }
};

// A view of the trie's arrays. A node outside 0 .. nodes - 1 is off the trie and has no children.
struct Trie {
  const std::int32_t* first_child;
  Tokens token;
  std::int64_t nodes;

  Children children(std::int64_t node) const {
    if (node < 0 || node >= nodes) return {token, 0, 0};
    const std::int64_t first = first_child[node];
    return {token.from(first), first, first_child[node + 1] - first};
  }

  // The child of `node` by `wanted`, -1 where there is none.
  std::int64_t step(std::int64_t node, std::int64_t wanted) const {
    const Children kids = children(node);
    const std::int64_t child = kids.below(wanted);
    return child < kids.count && kids.tokens[child] == wanted ? kids.first + child : -1;
  }
};

// A trie with its items: where each ends (-1 for one that was removed), and those that do, by (node, item).
struct Catalogue {
  Trie trie;
  const std::int32_t* item_node;
  const std::int32_t* node_items;
  std::int64_t items, present;

  std::int64_t end_of(std::int64_t rank) const { return item_node[node_items[rank]]; }

  // How many items end at nodes before this one.
  std::int64_t items_before(std::int64_t node) const {
    // Where each item has a leaf of its own, and all leaves are at the last depth, this is it.
    const std::int64_t guess = present - (trie.nodes - node);
    if (guess > 0 && guess < present && end_of(guess - 1) < node && end_of(guess) >= node) return guess;
    std::int64_t low = 0, left = present;
    while (left > 0) {
      const std::int64_t half = left / 2;
      const bool before = end_of(low + half) < node;
      low += before ? half + 1 : 0;
      left = before ? left - half - 1 : half;
    }
    return low;
  }

  // The items that end exactly at `node`.
  struct Ending {
    const std::int32_t* begin;
    std::int64_t count;
  };
  Ending ending_at(std::int64_t node) const {
    const std::int64_t first = items_before(node);
    std::int64_t end = first;
    while (end < present && end_of(end) == node) ++end;
    return {node_items + first, end - first};
  }
};

}  // namespace gflowgr
