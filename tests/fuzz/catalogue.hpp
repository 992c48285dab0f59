#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "policy.hpp"
#include "views.hpp"

// A catalogue out of a fuzzer's bytes, and what its trie has to be, found without any of the core's code.
namespace gflowgr::fuzz {

#define REQUIRE(condition)                                                         \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

using Path = std::vector<std::int64_t>;

struct Sequences {
  std::int64_t items, levels;
  std::vector<std::int64_t> tokens;

  // The tokens before the padding; `valid` says whether only padding follows and there is a token at all.
  Path path(std::int64_t item, bool& valid) const {
    Path path;
    bool padding = false;
    valid = true;
    for (std::int64_t level = 0; level < levels; ++level) {
      const std::int64_t token = tokens[item * levels + level];
      valid = valid && token >= -1 && !(padding && token >= 0);
      padding = padding || token < 0;
      if (!padding) path.push_back(token);
    }
    valid = valid && !path.empty();
    return path;
  }
};

// Tokens of one of several kinds: few, so that prefixes are shared; around the digits of the radix sort; any.
inline std::int64_t consume_token(FuzzedDataProvider& bytes, int kind) {
  constexpr std::int64_t kLast = 0x7ffffffe;
  switch (kind) {
    case 0:
      return bytes.ConsumeIntegralInRange<int>(-1, 3);
    case 1:
      return std::int64_t{1} << bytes.ConsumeIntegralInRange<int>(0, 30);
    case 2:
      return 65536 + bytes.ConsumeIntegralInRange<int>(-2, 2);
    case 3:
      return kLast - bytes.ConsumeIntegralInRange<int>(0, 3);
    default:
      return bytes.ConsumeIntegralInRange<std::int64_t>(-1, kLast);
  }
}

inline Sequences consume_rows(FuzzedDataProvider& bytes, std::int64_t most_items, std::int64_t most_levels,
                              std::int64_t largest_token) {
  Sequences rows{bytes.ConsumeIntegralInRange<std::int64_t>(1, most_items),
                 bytes.ConsumeIntegralInRange<std::int64_t>(1, most_levels),
                 {}};
  const int kind = bytes.ConsumeIntegralInRange<int>(0, 5);
  for (std::int64_t i = 0; i < rows.items * rows.levels; ++i) {
    const std::int64_t token = consume_token(bytes, kind == 5 ? bytes.ConsumeIntegralInRange<int>(0, 4) : kind);
    rows.tokens.push_back(token < 0 ? token : token % (largest_token + 1));
  }
  // Most bytes would otherwise make a catalogue that is refused.
  if (bytes.ConsumeIntegralInRange<int>(0, 9) > 0)
    for (std::int64_t item = 0; item < rows.items; ++item) {
      bool ended = false;
      for (std::int64_t level = 0; level < rows.levels; ++level) {
        std::int64_t& token = rows.tokens[item * rows.levels + level];
        if (level == 0 && token < 0) token = 0;
        ended = ended || token < 0;
        if (ended) token = -1;
      }
    }
  return rows;
}

struct Oracle {
  std::map<Path, std::vector<std::int64_t>> items_under, items_at;

  explicit Oracle(const Sequences& rows) {
    for (std::int64_t item = 0; item < rows.items; ++item) {
      bool valid = false;
      const Path path = rows.path(item, valid);
      for (std::size_t length = 0; length <= path.size(); ++length)
        items_under[Path(path.begin(), path.begin() + length)].push_back(item);
      items_at[path].push_back(item);
    }
  }
  bool has(const Path& path) const { return items_under.count(path) > 0; }
  std::vector<std::int64_t> children(const Path& path) const {
    std::vector<std::int64_t> tokens;
    for (auto it = items_under.upper_bound(path); it != items_under.end(); ++it) {
      const Path& other = it->first;
      if (other.size() < path.size() || !std::equal(path.begin(), path.end(), other.begin())) break;
      if (other.size() == path.size() + 1) tokens.push_back(other.back());
    }
    return tokens;
  }
};

// The path into every node, parents before children.
inline std::vector<Path> paths_of(const Trie& trie) {
  std::vector<Path> paths(trie.nodes);
  for (std::int64_t node = 0; node < trie.nodes; ++node)
    for (std::int64_t child = trie.first_child[node]; child < trie.first_child[node + 1]; ++child) {
      paths[child] = paths[node];
      paths[child].push_back(trie.token[child]);
    }
  return paths;
}

inline bool all_valid(const Sequences& rows) {
  for (std::int64_t item = 0; item < rows.items; ++item) {
    bool valid = false;
    rows.path(item, valid);
    if (!valid) return false;
  }
  return true;
}

}  // namespace gflowgr::fuzz
