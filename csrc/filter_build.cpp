#include "filter_build.hpp"

#include <algorithm>
#include <functional>

#include "filter.hpp"
#include "parallel.hpp"

namespace gflowgr {
namespace {

// About nanoseconds to find a node's parent.
constexpr std::int64_t kParentCost = 200;
// A set of more than one item in so many nodes is marked by a pass over all nodes, which finds no parents.
constexpr std::int64_t kSparse = 64;

void set_bit(std::int32_t* words, std::int64_t member) {
  words[member / 32] = static_cast<std::int32_t>(static_cast<std::uint32_t>(words[member / 32]) | 1u << member % 32);
}

// The nodes' children are contiguous and in the order of the nodes, so no array of parents is needed.
std::int64_t parent(const Trie& trie, std::int64_t node) {
  return std::upper_bound(trie.first_child, trie.first_child + trie.nodes + 1, node) - trie.first_child - 1;
}

void mark_every_parent(const Trie& trie, std::int32_t* marked) {
  for (std::int64_t node = trie.nodes - 1; node >= 0; --node) {
    const std::int64_t end = trie.first_child[node + 1];
    for (std::int64_t child = trie.first_child[node]; child < end; ++child) {
      if (!bit(marked, child)) continue;
      set_bit(marked, node);
      break;
    }
  }
}

void mark_upwards(const Trie& trie, std::int64_t node, std::int32_t* marked) {
  for (; !bit(marked, node); node = parent(trie, node)) {
    set_bit(marked, node);
    if (node == 0) return;
  }
}

// The hidden nodes of one row, from the deepest up.
class Hiding {
 public:
  Hiding(const EndingItems& ending, const AllowedSet* set) : ending_(ending), set_(set) {}

  void add(std::int64_t item) {
    if (set_ && !bit(set_->items, item)) return;
    if (ending_.item_node[item] >= 0) ends_.push_back(ending_.item_node[item]);
  }

  std::vector<std::int32_t> find() {
    std::sort(ends_.begin(), ends_.end(), std::greater<>());
    std::vector<std::int32_t> hidden;
    // Nodes descend, and so do their parents: two sorted queues hold what is left to judge.
    std::size_t end = 0, above = 0;
    while (end < ends_.size() || above < parents_.size()) {
      const std::int32_t node =
          std::max(end < ends_.size() ? ends_[end] : -1, above < parents_.size() ? parents_[above] : -1);
      const std::size_t end_before = end, above_before = above;
      while (end < ends_.size() && ends_[end] == node) ++end;
      while (above < parents_.size() && parents_[above] == node) ++above;
      if (!is_hidden(node, end - end_before, above - above_before)) continue;
      hidden.push_back(node);
      if (node > 0) parents_.push_back(static_cast<std::int32_t>(parent(ending_.trie, node)));
    }
    std::reverse(hidden.begin(), hidden.end());
    return hidden;
  }

 private:
  bool is_hidden(std::int64_t node, std::size_t excluded, std::size_t hidden_children) const {
    const Children kids = ending_.trie.children(node);
    std::size_t children = kids.count;
    if (set_) {
      children = 0;
      for (std::int64_t child = 0; child < kids.count; ++child) children += bit(set_->nodes, kids.first + child);
    }
    if (children != hidden_children) return false;
    const EndingItems::Range own = ending_.at(node);
    std::size_t items = own.count;
    if (set_)
      items =
          std::count_if(own.begin, own.begin + own.count, [&](std::int32_t item) { return bit(set_->items, item); });
    return items == excluded;
  }

  const EndingItems& ending_;
  const AllowedSet* set_;
  std::vector<std::int32_t> ends_, parents_;
};

}  // namespace

void allow(const EndingItems& ending, const std::int64_t* members, std::int64_t count, const AllowedSet& set) {
  const Trie& trie = ending.trie;
  const bool sparse = count < trie.nodes / kSparse;
  for (std::int64_t i = 0; i < count; ++i) {
    set_bit(set.items, members[i]);
    const std::int64_t node = ending.item_node[members[i]];
    if (node < 0) continue;
    if (sparse) {
      mark_upwards(trie, node, set.nodes);
    } else {
      set_bit(set.nodes, node);
    }
  }
  if (!sparse) mark_every_parent(trie, set.nodes);
}

HiddenNodes hidden_nodes(const EndingItems& ending, const std::int64_t* offsets, const std::int64_t* excluded,
                         std::int64_t rows, const std::vector<AllowedSet>* sets, int threads) {
  std::vector<std::vector<std::int32_t>> found(rows);
  const std::int64_t grain =
      grain_of(rows, [&](std::int64_t b) { return (offsets[b + 1] - offsets[b]) * kParentCost; });
  parallel_for(rows, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      Hiding hiding(ending, sets ? &(*sets)[b] : nullptr);
      for (std::int64_t i = offsets[b]; i < offsets[b + 1]; ++i) hiding.add(excluded[i] - b * ending.items);
      found[b] = hiding.find();
    }
  });
  HiddenNodes result;
  result.offsets.reserve(rows + 1);
  result.offsets.push_back(0);
  for (const auto& nodes : found) {
    result.nodes.insert(result.nodes.end(), nodes.begin(), nodes.end());
    result.offsets.push_back(static_cast<std::int64_t>(result.nodes.size()));
  }
  return result;
}

}  // namespace gflowgr
