#pragma once

#include <algorithm>
#include <cstdint>

namespace gflowgr {

// The children of a node: the nodes first .. first + count - 1, and their tokens, ascending.
struct Children {
  const std::int32_t* tokens;
  std::int64_t first;
  std::int64_t count;
};

// A view of the trie's arrays. A node outside 0 .. nodes - 1 is off the trie and has no children.
struct Trie {
  const std::int32_t* first_child;
  const std::int32_t* token;
  std::int64_t nodes;

  Children children(std::int64_t node) const {
    if (node < 0 || node >= nodes) return {token, 0, 0};
    const std::int64_t first = first_child[node];
    return {token + first, first, first_child[node + 1] - first};
  }

  // The child of `node` by `wanted`, -1 where there is none.
  std::int64_t step(std::int64_t node, std::int64_t wanted) const {
    const Children kids = children(node);
    const std::int32_t* end = kids.tokens + kids.count;
    const std::int32_t* found = std::lower_bound(kids.tokens, end, wanted);
    return found != end && *found == wanted ? kids.first + (found - kids.tokens) : -1;
  }
};

}  // namespace gflowgr
