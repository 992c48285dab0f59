#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "trie.hpp"

// Which children a row of a batch may go to. A reader belongs to one thread, and hands the children of a node to a
// body: as they are in the trie where all are available, else those that are, in memory of its own.
namespace gflowgr {

// Some children of a node, ascending, under the names that `Children` has.
struct SomeChildren {
  const std::int32_t* tokens;
  const std::int32_t* nodes;
  std::int64_t first;
  std::int64_t count;
};

inline std::int64_t node_of(const Children& kids, std::int64_t child) { return kids.first + child; }
inline std::int64_t node_of(const SomeChildren& kids, std::int64_t child) { return kids.nodes[child]; }

// Which of `kids` a node is, -1 if none; the node is a child of their parent.
inline std::int64_t find_node(const Children& kids, std::int64_t node) { return node - kids.first; }
inline std::int64_t find_node(const SomeChildren& kids, std::int64_t node) {
  const std::int32_t* found = std::lower_bound(kids.nodes, kids.nodes + kids.count, node);
  return found != kids.nodes + kids.count && *found == node ? found - kids.nodes : -1;
}

inline bool bit(const std::int32_t* words, std::int64_t member) { return words[member / 32] >> (member % 32) & 1; }

// The tokens that have a column: `first` .. `first` + `count` - 1.
struct Columns {
  std::int64_t first, count;

  bool hold(const Children& kids) const {
    return kids.count == 0 || (kids.tokens[0] >= first && kids.tokens[kids.count - 1] < first + count);
  }
  bool hold(std::int64_t token) const { return token >= first && token < first + count; }
};

// Those children of a node that `keep(child)` holds for.
class Selection {
 public:
  template <class Keep>
  SomeChildren of(const Children& kids, const Keep& keep) {
    if (static_cast<std::int64_t>(nodes_.size()) < kids.count) {
      tokens_.resize(kids.count);
      nodes_.resize(kids.count);
    }
    std::int64_t count = 0;
    for (std::int64_t child = 0; child < kids.count; ++child) {
      // Written either way: whether to keep a child is hard to predict.
      tokens_[count] = static_cast<std::int32_t>(kids.tokens[child]);
      nodes_[count] = static_cast<std::int32_t>(kids.first + child);
      count += keep(child);
    }
    return {tokens_.data(), nodes_.data(), kids.first, count};
  }

 private:
  std::vector<std::int32_t> tokens_, nodes_;
};

// Every child is available.
struct NoFilter {
  class Reader {
   public:
    explicit Reader(const Trie& trie) : trie_(trie) {}

    template <class Body>
    void children(std::int64_t, std::int64_t node, const Body& body) {
      body(trie_.children(node));
    }

    // The same, but only those whose tokens have a column.
    template <class Body>
    void children(std::int64_t, std::int64_t node, const Columns& columns, const Body& body) {
      const Children kids = trie_.children(node);
      if (columns.hold(kids)) return body(kids);
      body(selection_.of(kids, [&](std::int64_t child) { return columns.hold(kids.tokens[child]); }));
    }

   private:
    const Trie& trie_;
    Selection selection_;
  };

  // `rows` is how many rows the kernel has.
  Reader reader(const Trie& trie, std::int64_t) const { return Reader(trie); }
};

// A view of a filter's arrays. Its row b serves an equal share of a kernel's rows, in order.
struct ItemFilter {
  // Ascending hidden nodes of row b: hidden_nodes[hidden_offsets[b] .. hidden_offsets[b + 1]).
  const std::int64_t* hidden_offsets;
  const std::int32_t* hidden_nodes;
  // Sets of a bit a node, `words` each, and the set of each row; null where every node is allowed.
  const std::int32_t* allowed;
  const std::int64_t* allowed_set;
  std::int64_t rows, words;

  class Reader {
   public:
    Reader(const Trie& trie, const ItemFilter& filter, std::int64_t share)
        : trie_(trie), filter_(filter), share_(share) {}

    template <class Body>
    void children(std::int64_t row, std::int64_t node, const Body& body) {
      read(row, trie_.children(node), [](std::int64_t) { return true; }, true, body);
    }

    template <class Body>
    void children(std::int64_t row, std::int64_t node, const Columns& columns, const Body& body) {
      const Children kids = trie_.children(node);
      read(row, kids, [&](std::int64_t child) { return columns.hold(kids.tokens[child]); }, columns.hold(kids), body);
    }

   private:
    template <class Keep, class Body>
    void read(std::int64_t row, const Children& kids, const Keep& keep, bool keeps_all, const Body& body) {
      const std::int64_t b = row / share_;
      const std::int32_t* end = filter_.hidden_nodes + filter_.hidden_offsets[b + 1];
      const std::int32_t* hidden = std::lower_bound(filter_.hidden_nodes + filter_.hidden_offsets[b], end, kids.first);
      const bool hides = hidden != end && *hidden < kids.first + kids.count;
      if (!hides && !filter_.allowed && keeps_all) return body(kids);
      const std::int32_t* words = filter_.allowed ? filter_.allowed + filter_.allowed_set[b] * filter_.words : nullptr;
      body(selection_.of(kids, [&](std::int64_t child) {
        const std::int64_t node = kids.first + child;
        if (hidden != end && *hidden == node) {
          ++hidden;
          return false;
        }
        return (!words || bit(words, node)) && keep(child);
      }));
    }

    const Trie& trie_;
    const ItemFilter& filter_;
    std::int64_t share_;
    Selection selection_;
  };

  Reader reader(const Trie& trie, std::int64_t kernel_rows) const {
    return Reader(trie, *this, std::max<std::int64_t>(kernel_rows / std::max<std::int64_t>(rows, 1), 1));
  }
};

}  // namespace gflowgr
