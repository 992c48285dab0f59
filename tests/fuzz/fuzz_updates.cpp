// Sequences of additions and removals: after each, the arrays are those of a trie built anew of the items that are
// present, and those of every version before are as they were.
#include <algorithm>
#include <stdexcept>

#include "catalogue.hpp"

namespace gflowgr::fuzz {
namespace {

constexpr int kMostSteps = 8;
constexpr std::int64_t kMostAdded = 12, kMostLevels = 6;

struct Version {
  std::vector<Path> paths;    // of every item that ever was
  std::vector<bool> present;  // whether it still is
  TrieArrays arrays;
};

Sequences rows_of(const std::vector<Path>& paths, std::int64_t padding) {
  std::size_t levels = 0;
  for (const Path& path : paths) levels = std::max(levels, path.size());
  Sequences rows{std::ssize(paths), static_cast<std::int64_t>(levels) + padding, {}};
  rows.tokens.assign(rows.items * rows.levels, -1);
  for (std::int64_t item = 0; item < rows.items; ++item)
    std::copy(paths[item].begin(), paths[item].end(), rows.tokens.begin() + item * rows.levels);
  return rows;
}

void check(const Version& version) {
  std::vector<Path> paths;
  std::vector<std::int32_t> numbers;
  for (std::size_t item = 0; item < version.paths.size(); ++item)
    if (version.present[item]) {
      paths.push_back(version.paths[item]);
      numbers.push_back(static_cast<std::int32_t>(item));
    }
  const Sequences rows = rows_of(paths, 0);
  const TrieArrays anew = build_trie(rows.tokens.data(), rows.items, rows.levels);
  REQUIRE(same_nodes(version.arrays, anew));
  const Catalogue found = catalogue(version.arrays);
  REQUIRE(found.items == std::ssize(version.paths) && found.present == rows.items);
  std::int64_t next = 0;
  for (std::int64_t item = 0; item < found.items; ++item)
    REQUIRE(found.item_node[item] == (version.present[item] ? anew.item_node.data()[next++] : -1));
  for (std::int64_t rank = 0; rank < rows.items; ++rank)
    REQUIRE(found.node_items[rank] == numbers[anew.node_items.data()[rank]]);
}

// What item `like` is, cut short or made longer, or a path of its own.
Path consume_path(FuzzedDataProvider& bytes, const Version& now, int kind) {
  Path path;
  const int relation = bytes.ConsumeIntegralInRange<int>(0, 4);
  if (relation > 0) path = now.paths[bytes.ConsumeIntegralInRange<std::size_t>(0, now.paths.size() - 1)];
  if (relation == 2 || relation == 4) path.resize(bytes.ConsumeIntegralInRange<std::size_t>(1, path.size()));
  if (relation == 0 || relation >= 3)
    for (std::int64_t more = bytes.ConsumeIntegralInRange<std::int64_t>(1, kMostLevels); more > 0; --more)
      path.push_back(std::max<std::int64_t>(consume_token(bytes, kind), 0));
  return path;
}

template <class Token>
bool adds(const Catalogue& catalogue, const Sequences& rows, TrieArrays& arrays) {
  const std::vector<Token> tokens(rows.tokens.begin(), rows.tokens.end());
  try {
    arrays = add_items(catalogue, tokens.data(), rows.items, rows.levels);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

bool add(FuzzedDataProvider& bytes, const Version& now, Version& next) {
  const int kind = bytes.ConsumeIntegralInRange<int>(0, 4);
  std::vector<Path> paths;
  for (std::int64_t more = bytes.ConsumeIntegralInRange<std::int64_t>(1, kMostAdded); more > 0; --more)
    paths.push_back(consume_path(bytes, now, kind));
  Sequences rows = rows_of(paths, bytes.ConsumeIntegralInRange<int>(0, 3));
  if (bytes.ConsumeIntegralInRange<int>(0, 15) == 0)
    rows.tokens[bytes.ConsumeIntegralInRange<std::size_t>(0, rows.tokens.size() - 1)] =
        bytes.ConsumeIntegralInRange<int>(-2, 1);
  const bool valid = all_valid(rows);
  const bool added = bytes.ConsumeBool() ? adds<std::int32_t>(catalogue(now.arrays), rows, next.arrays)
                                         : adds<std::int64_t>(catalogue(now.arrays), rows, next.arrays);
  REQUIRE(added == valid);
  if (!added) return false;
  next.paths = now.paths;
  for (std::int64_t item = 0; item < rows.items; ++item) {
    bool path_is_valid = false;
    next.paths.push_back(rows.path(item, path_is_valid));
  }
  next.present = now.present;
  next.present.resize(next.paths.size(), true);
  return true;
}

bool remove(FuzzedDataProvider& bytes, const Version& now, Version& next) {
  next.paths = now.paths;
  next.present = now.present;
  std::vector<std::int64_t> removed;
  // Some of all, all, or those whose tokens need 32 bits.
  const int density = bytes.ConsumeIntegralInRange<int>(0, 5);
  for (std::size_t item = 0; item < now.paths.size(); ++item) {
    if (!now.present[item]) continue;
    const bool is_wide = *std::max_element(now.paths[item].begin(), now.paths[item].end()) > kLargestNarrow;
    const bool goes = density == 5 ? is_wide : density == 4 || bytes.ConsumeIntegralInRange<int>(0, 4) <= density;
    if (!goes) continue;
    removed.push_back(static_cast<std::int64_t>(item));
    next.present[item] = false;
  }
  // They come in no order.
  if (!removed.empty())
    std::rotate(removed.begin(), removed.begin() + bytes.ConsumeIntegralInRange<std::size_t>(0, removed.size() - 1),
                removed.end());
  if (bytes.ConsumeBool()) std::reverse(removed.begin(), removed.end());
  const bool leaves_any = std::find(next.present.begin(), next.present.end(), true) != next.present.end();
  bool done = true;
  try {
    next.arrays = remove_items(catalogue(now.arrays), removed.data(), std::ssize(removed));
  } catch (const std::invalid_argument&) {
    done = false;
  }
  REQUIRE(done == leaves_any);
  return done;
}

}  // namespace
}  // namespace gflowgr::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace gflowgr;
  using namespace gflowgr::fuzz;
  FuzzedDataProvider bytes(data, size);
  const Sequences rows = consume_rows(bytes, 20, kMostLevels, 0x7ffffffe);
  if (!all_valid(rows)) return 0;
  std::vector<Version> versions(1);
  for (std::int64_t item = 0; item < rows.items; ++item) {
    bool valid = false;
    versions[0].paths.push_back(rows.path(item, valid));
  }
  versions[0].present.assign(rows.items, true);
  versions[0].arrays = build_trie(rows.tokens.data(), rows.items, rows.levels);
  for (int steps = bytes.ConsumeIntegralInRange<int>(1, kMostSteps); steps > 0; --steps) {
    Version next;
    const bool changed = bytes.ConsumeBool() ? add(bytes, versions.back(), next) : remove(bytes, versions.back(), next);
    if (!changed) continue;
    check(next);
    versions.push_back(std::move(next));
    // A version owns its arrays: it outlives the one it was made of, and that one it.
    if (bytes.ConsumeIntegralInRange<int>(0, 3) == 0) versions.erase(versions.begin());
  }
  for (const Version& version : versions) check(version);
  return 0;
}
