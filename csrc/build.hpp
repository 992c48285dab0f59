#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "trie.hpp"

// Catalogues as arrays: built from rows, changed into others, and what can be told from them.
namespace gflowgr {

constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kLargestNarrow = std::numeric_limits<std::uint16_t>::max();

// An array whose values are to be written before they are read; memory is touched once.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size) : data_(std::make_unique_for_overwrite<T[]>(size)), size_(size) {}
  T& operator[](std::int64_t index) { return data_[index]; }
  const T* data() const { return data_.get(); }
  T* data() { return data_.get(); }
  std::int64_t size() const { return size_; }

 private:
  std::unique_ptr<T[]> data_;
  std::int64_t size_ = 0;
};

// The tokens of all nodes in one of two widths. That of the root, which has none, is the largest that there is.
class TokenBuffer {
 public:
  TokenBuffer() = default;
  TokenBuffer(std::int64_t size, bool narrow) : is_narrow_(narrow) {
    if (narrow)
      narrow_ = Buffer<std::uint16_t>(size);
    else
      wide_ = Buffer<std::int32_t>(size);
    set(0, -1);
  }
  void set(std::int64_t node, std::int64_t token) {
    if (is_narrow_)
      narrow_[node] = static_cast<std::uint16_t>(token);
    else
      wide_[node] = static_cast<std::int32_t>(token);
  }
  void copy(std::int64_t node, const Tokens& tokens, std::int64_t count) {
    is_narrow_ ? tokens.copy_to(narrow_.data() + node, count) : tokens.copy_to(wide_.data() + node, count);
    if (node == 0) set(0, -1);
  }
  bool is_narrow() const { return is_narrow_; }
  Tokens tokens() const { return is_narrow_ ? Tokens(narrow_.data()) : Tokens(wide_.data()); }
  Buffer<std::uint16_t>& narrow() { return narrow_; }
  Buffer<std::int32_t>& wide() { return wide_; }

 private:
  bool is_narrow_ = false;
  Buffer<std::uint16_t> narrow_;
  Buffer<std::int32_t> wide_;
};

// Nodes in breadth-first order. item_node[i] is where item i ends, -1 if it was removed; node_items are those that
// were not, by (node, item).
struct TrieArrays {
  Buffer<std::int32_t> first_child;
  TokenBuffer token;
  Buffer<std::int32_t> item_node, node_items;
};

// Rows of tokens (row major, -1 pads tails), their lengths, their order and the largest token in them.
template <class Token>
struct Rows {
  const Token* data;
  std::int64_t levels;
  std::vector<std::int32_t> lengths, order;
  std::int64_t largest;

  std::int64_t size() const { return static_cast<std::int64_t>(order.size()); }
  const Token* in_order(std::int64_t rank) const { return data + order[rank] * levels; }
  std::int64_t length(std::int64_t rank) const { return lengths[order[rank]]; }
  // Tokens that a row has in common with the one before it in order.
  std::int64_t shared(std::int64_t rank) const {
    if (rank == 0) return 0;
    const Token *before = in_order(rank - 1), *row = in_order(rank);
    std::int64_t depth = 0;
    while (depth < length(rank) && row[depth] == before[depth]) ++depth;
    return depth;
  }
};

// Throws std::invalid_argument that names the first bad row, std::length_error past 2^31 - 1 rows.
template <class Token>
Rows<Token> sorted_rows(const Token* data, std::int64_t items, std::int64_t levels);

// The trie of rows. Throws like `sorted_rows`, and std::length_error past 2^31 - 1 nodes.
template <class Token>
TrieArrays build_trie(const Token* rows, std::int64_t items, std::int64_t levels);

// The catalogue with more items, numbered from `catalogue.items` on. Throws like `build_trie`.
template <class Token>
TrieArrays add_items(const Catalogue& catalogue, const Token* rows, std::int64_t items, std::int64_t levels);

// The catalogue without some items, each of them named once and present. Throws std::invalid_argument if none stays.
TrieArrays remove_items(const Catalogue& catalogue, const std::int64_t* removed, std::int64_t count);

// For each depth: where its nodes begin (and after the last, where they end), the most children of one of its nodes,
// and the smallest and the largest token that leads on from there.
struct Levels {
  std::vector<std::int64_t> offsets, most_children, smallest_token, largest_token;
};
Levels levels_of(const Trie& trie);
// Where the nodes of each depth begin, and where the last end.
std::vector<std::int64_t> level_offsets_of(const Trie& trie);

}  // namespace gflowgr
