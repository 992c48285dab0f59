#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "build.hpp"

// A change copies the arrays in runs, with a constant added between one changed place and the next: it costs about
// what copying costs, and gives what building anew would.
namespace gflowgr {
namespace {

constexpr std::int32_t kNone = -1;

// A new node among the old ones of its depth.
struct Inserted {
  std::int64_t before;  // the old node that it comes before
  std::int64_t token;
  std::int64_t parent;  // its new number
};

// All new nodes by depth, and how the old ones are numbered after them.
class Insertions {
 public:
  Insertions(const Trie& trie, std::int64_t depth) : offsets_(level_offsets_of(trie)), by_depth_(depth + 2) {
    // Rows may be shorter than the trie is deep, and longer: either way one empty depth follows the last.
    offsets_.resize(std::max<std::size_t>(offsets_.size() + 1, depth + 3), trie.nodes);
  }
  std::int64_t depth() const { return std::ssize(offsets_) - 2; }
  std::int64_t offset(std::int64_t depth) const { return offsets_[depth]; }
  const std::vector<Inserted>& at(std::int64_t depth) const { return by_depth_[depth]; }
  std::int64_t add(std::int64_t depth, const Inserted& node) {
    if (std::ssize(by_depth_) < depth + 2) by_depth_.resize(depth + 2);
    by_depth_[depth].push_back(node);
    return std::ssize(by_depth_[depth]) - 1;
  }
  // Once all are in.
  void count() {
    by_depth_.resize(std::max<std::size_t>(by_depth_.size(), depth() + 2));
    shallower_.assign(by_depth_.size() + 1, 0);
    for (std::size_t depth = 0; depth < by_depth_.size(); ++depth)
      shallower_[depth + 1] = shallower_[depth] + std::ssize(by_depth_[depth]);
  }
  std::int64_t shallower(std::int64_t depth) const { return shallower_[depth]; }
  std::int64_t total() const { return shallower_.back(); }
  std::int64_t number_of_new(std::int64_t depth, std::int64_t index) const {
    return by_depth_[depth][index].before + shallower_[depth] + index;
  }
  std::int64_t number_of_old(std::int64_t depth, std::int64_t node) const {
    const auto& inserted = by_depth_[depth];
    const auto after = std::upper_bound(inserted.begin(), inserted.end(), node,
                                        [](std::int64_t old, const Inserted& other) { return old < other.before; });
    return node + shallower_[depth] + (after - inserted.begin());
  }
  void set_parent(std::int64_t depth, std::int64_t index, std::int64_t parent) {
    by_depth_[depth][index].parent = parent;
  }

 private:
  std::vector<std::int64_t> offsets_;
  std::vector<std::vector<Inserted>> by_depth_;
  std::vector<std::int64_t> shallower_;
};

// A node as it is known before the new ones are counted: an old one by its number, a new one by its index.
struct Place {
  std::int64_t depth, old, index;
};

std::int64_t number_of(const Insertions& insertions, const Place& place) {
  return place.old >= 0 ? insertions.number_of_old(place.depth, place.old)
                        : insertions.number_of_new(place.depth, place.index);
}

// Finds where rows leave the trie; returns where each ends, in the rows' order.
template <class Token>
std::vector<Place> insert_paths(const Trie& trie, const Rows<Token>& rows, Insertions& insertions) {
  std::vector<Place> open(rows.levels + 1), ends(rows.size());
  std::vector<std::vector<Place>> parents(rows.levels + 2);
  open[0] = {0, 0, kNone};
  for (std::int64_t rank = 0; rank < rows.size(); ++rank) {
    const Token* row = rows.in_order(rank);
    for (std::int64_t depth = rows.shared(rank); depth < rows.length(rank); ++depth) {
      const Place& parent = open[depth];
      std::int64_t before;
      if (parent.old >= 0) {
        const Children kids = trie.children(parent.old);
        const std::int64_t child = kids.below(row[depth]);
        before = kids.first + child;
        if (child < kids.count && kids.tokens[child] == row[depth]) {
          open[depth + 1] = {depth + 1, before, kNone};
          continue;
        }
      } else {
        before = trie.first_child[insertions.at(depth)[parent.index].before];
      }
      parents[depth + 1].push_back(parent);
      open[depth + 1] = {depth + 1, kNone, insertions.add(depth + 1, {before, row[depth], kNone})};
    }
    ends[rank] = open[rows.length(rank)];
  }
  insertions.count();
  for (std::int64_t depth = 1; depth <= rows.levels; ++depth)
    for (std::int64_t index = 0; index < std::ssize(parents[depth]); ++index)
      insertions.set_parent(depth, index, number_of(insertions, parents[depth][index]));
  return ends;
}

void write_nodes(const Trie& trie, const Insertions& insertions, TrieArrays& out) {
  std::int64_t node = 0;
  for (std::int64_t depth = 0; depth < insertions.depth(); ++depth) {
    const auto &here = insertions.at(depth), &below = insertions.at(depth + 1);
    const std::int64_t end = insertions.offset(depth + 1), shallower = insertions.shallower(depth + 1);
    std::int64_t old = insertions.offset(depth);
    // New nodes met at this depth, and children of nodes met so far among the new ones of the next.
    std::int64_t met = 0, children = 0;
    while (old < end || met < std::ssize(here)) {
      while (children < std::ssize(below) && below[children].parent < node) ++children;
      const std::int64_t shift = shallower + children;
      if (met < std::ssize(here) && here[met].before == old) {
        out.token.set(node, here[met++].token);
        out.first_child[node++] = static_cast<std::int32_t>(trie.first_child[old] + shift);
        continue;
      }
      std::int64_t run = (met < std::ssize(here) ? here[met].before : end) - old;
      if (children < std::ssize(below)) run = std::min(run, below[children].parent - node + 1);
      out.token.copy(node, trie.token.from(old), run);
      for (std::int64_t i = 0; i < run; ++i)
        out.first_child[node + i] = trie.first_child[old + i] + static_cast<std::int32_t>(shift);
      old += run;
      node += run;
    }
  }
  out.first_child[node] = static_cast<std::int32_t>(node);
}

// Ends of new items by their nodes' new numbers.
struct End {
  std::int64_t node;
  std::int32_t item;
};

void write_items(const Catalogue& catalogue, const Insertions& insertions, const std::vector<End>& ends,
                 TrieArrays& out) {
  std::int64_t place = 0;
  auto next = ends.begin();
  const auto put = [&](std::int32_t item, std::int64_t node) {
    out.node_items[place++] = item;
    out.item_node[item] = static_cast<std::int32_t>(node);
  };
  if (catalogue.present < catalogue.items) std::fill_n(out.item_node.data(), catalogue.items, kNone);
  std::int64_t depth = 0, met = 0;
  for (std::int64_t rank = 0; rank < catalogue.present; ++rank) {
    const std::int32_t item = catalogue.node_items[rank], old = catalogue.item_node[item];
    for (; old >= insertions.offset(depth + 1); met = 0) ++depth;
    const auto& here = insertions.at(depth);
    while (met < std::ssize(here) && here[met].before <= old) ++met;
    const std::int64_t node = old + insertions.shallower(depth) + met;
    for (; next != ends.end() && next->node < node; ++next) put(next->item, next->node);
    put(item, node);
  }
  for (; next != ends.end(); ++next) put(next->item, next->node);
}

// The nodes that vanish with the removed items, ascending, and their parents.
struct Vanished {
  std::vector<std::int64_t> nodes, parents;
};

Vanished vanished(const Catalogue& catalogue, const std::int64_t* removed, std::int64_t count) {
  const Trie& trie = catalogue.trie;
  std::vector<std::int64_t> ends(count);
  std::transform(removed, removed + count, ends.begin(), [&](std::int64_t item) { return catalogue.item_node[item]; });
  std::sort(ends.begin(), ends.end());
  const std::vector<std::int64_t> offsets = level_offsets_of(trie);
  Vanished all;
  std::vector<std::int64_t> below;  // parents of what vanishes one level deeper, descending
  auto end = ends.rbegin();
  // Levels come deepest first, and so do the nodes of a level: all are reversed at the end.
  for (std::int64_t depth = std::ssize(offsets) - 2; depth >= 0; --depth) {
    std::vector<std::int64_t> above;
    auto child = below.begin();
    while (true) {
      const bool ending = end != ends.rend() && *end >= offsets[depth], emptied = child != below.end();
      if (!ending && !emptied) break;
      const std::int64_t node = std::max(ending ? *end : kNone, emptied ? *child : kNone);
      std::int64_t own = catalogue.ending_at(node).count, children = trie.children(node).count;
      for (; end != ends.rend() && *end == node; ++end) --own;
      for (; child != below.end() && *child == node; ++child) --children;
      if (own > 0 || children > 0) continue;
      if (node == 0) throw std::invalid_argument("items has all that the trie holds, needs to leave at least one");
      const std::int32_t *first = trie.first_child + offsets[depth - 1], *last = trie.first_child + offsets[depth];
      above.push_back(std::upper_bound(first, last, node) - trie.first_child - 1);
      all.nodes.push_back(node);
      all.parents.push_back(above.back());
    }
    below = std::move(above);
  }
  std::reverse(all.nodes.begin(), all.nodes.end());
  std::reverse(all.parents.begin(), all.parents.end());
  return all;
}

}  // namespace

template <class Token>
TrieArrays add_items(const Catalogue& catalogue, const Token* data, std::int64_t items, std::int64_t levels) {
  const Trie& trie = catalogue.trie;
  const Rows<Token> rows = sorted_rows(data, items, levels);
  if (catalogue.items + items > kLargest) throw std::length_error("sequences makes more than 2**31 - 1 items");
  Insertions insertions(trie, levels);
  const std::vector<Place> places = insert_paths(trie, rows, insertions);
  const std::int64_t nodes = trie.nodes + insertions.total();
  if (nodes > kLargest) throw std::length_error("sequences make a trie of more than 2**31 - 1 nodes");
  std::vector<End> ends(items);
  for (std::int64_t rank = 0; rank < items; ++rank)
    ends[rank] = {number_of(insertions, places[rank]), static_cast<std::int32_t>(catalogue.items + rows.order[rank])};
  std::stable_sort(ends.begin(), ends.end(), [](const End& a, const End& b) { return a.node < b.node; });

  TrieArrays out{Buffer<std::int32_t>(nodes + 1),
                 TokenBuffer(nodes, trie.token.is_narrow() && rows.largest <= kLargestNarrow),
                 Buffer<std::int32_t>(catalogue.items + items), Buffer<std::int32_t>(catalogue.present + items)};
  write_nodes(trie, insertions, out);
  write_items(catalogue, insertions, ends, out);
  return out;
}

TrieArrays remove_items(const Catalogue& catalogue, const std::int64_t* removed, std::int64_t count) {
  const Trie& trie = catalogue.trie;
  const Vanished gone = vanished(catalogue, removed, count);
  const std::int64_t going = std::ssize(gone.nodes), nodes = trie.nodes - going;
  bool narrow = trie.token.is_narrow();
  if (!narrow) {
    std::int64_t largest = 0, next = 0;
    for (std::int64_t node = 1; node < trie.nodes; ++node) {
      if (next < going && gone.nodes[next] == node)
        ++next;
      else
        largest = std::max<std::int64_t>(largest, trie.token[node]);
    }
    narrow = largest <= kLargestNarrow;
  }

  TrieArrays out{Buffer<std::int32_t>(nodes + 1), TokenBuffer(nodes, narrow), Buffer<std::int32_t>(catalogue.items),
                 Buffer<std::int32_t>(catalogue.present - count)};
  // Nodes gone so far, and children gone of the nodes so far.
  std::int64_t met = 0, children = 0, node = 0;
  for (std::int64_t old = 0; old < trie.nodes;) {
    while (children < going && gone.parents[children] < old) ++children;
    if (met < going && gone.nodes[met] == old) {
      ++met;
      ++old;
      continue;
    }
    std::int64_t run = (met < going ? gone.nodes[met] : trie.nodes) - old;
    if (children < going) run = std::min(run, gone.parents[children] - old + 1);
    out.token.copy(node, trie.token.from(old), run);
    for (std::int64_t i = 0; i < run; ++i)
      out.first_child[node + i] = trie.first_child[old + i] - static_cast<std::int32_t>(children);
    old += run;
    node += run;
  }
  out.first_child[nodes] = static_cast<std::int32_t>(nodes);

  std::vector<bool> is_removed(catalogue.items, false);
  for (std::int64_t i = 0; i < count; ++i) is_removed[removed[i]] = true;
  std::fill_n(out.item_node.data(), catalogue.items, kNone);
  std::int64_t place = 0;
  met = 0;
  for (std::int64_t rank = 0; rank < catalogue.present; ++rank) {
    const std::int32_t item = catalogue.node_items[rank];
    if (is_removed[item]) continue;
    while (met < going && gone.nodes[met] < catalogue.item_node[item]) ++met;
    out.node_items[place++] = item;
    out.item_node[item] = catalogue.item_node[item] - static_cast<std::int32_t>(met);
  }
  return out;
}

template TrieArrays add_items(const Catalogue&, const std::int32_t*, std::int64_t, std::int64_t);
template TrieArrays add_items(const Catalogue&, const std::int64_t*, std::int64_t, std::int64_t);

}  // namespace gflowgr
