// What TSan watches: readers of a trie while others replace it, and parallel_for called from many threads, nested,
// failing, and after a fork. Not a fuzzer; scripts/sanitize.sh builds and runs it.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "filter_build.hpp"
#include "parallel.hpp"
#include "policy.hpp"
#include "views.hpp"

namespace gflowgr {
namespace {

constexpr int kReaders = 3, kVersions = 40, kRounds = 40;
constexpr std::int64_t kLevels = 4, kFirstItems = 64, kChanged = 8, kDraws = 32, kWide = 70000;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}

// A catalogue, with every row that ever was: item i of version v is [v % 5, i, i + v], cut short or made longer, so
// that a mixture of two versions would be seen.
struct Version {
  std::int64_t number;
  std::vector<std::int64_t> rows;
  std::vector<bool> present;
  TrieArrays arrays;

  std::int64_t items() const { return std::ssize(present); }
  std::vector<std::int64_t> ids() const {
    std::vector<std::int64_t> ids;
    for (std::int64_t item = 0; item < items(); ++item)
      if (present[item]) ids.push_back(item);
    return ids;
  }
};

void append_rows(Version& version, std::int64_t count, std::int64_t largest) {
  for (std::int64_t item = version.items(), end = item + count; item < end; ++item) {
    const std::int64_t tokens[kLevels] = {version.number % 5, item, item + version.number, largest};
    const std::int64_t length = 2 + item % 3;
    for (std::int64_t level = 0; level < kLevels; ++level) version.rows.push_back(level < length ? tokens[level] : -1);
    version.present.push_back(true);
  }
}

std::shared_ptr<const Version> first_version() {
  auto made = std::make_shared<Version>();
  made->number = 1;
  append_rows(*made, kFirstItems, 0);
  made->arrays = build_trie(made->rows.data(), made->items(), kLevels);
  return made;
}

// Versions in turn: items added, the oldest removed, items added whose tokens need 32 bits, those removed again.
std::shared_ptr<const Version> next_version(const Version& now) {
  auto made = std::make_shared<Version>();
  made->number = now.number + 1;
  made->rows = now.rows;
  made->present = now.present;
  const Catalogue from = fuzz::catalogue(now.arrays);
  if (made->number % 2 == 0) {
    append_rows(*made, kChanged, made->number % 4 == 0 ? kWide : 0);
    made->arrays = add_items(from, made->rows.data() + now.rows.size(), kChanged, kLevels);
  } else {
    const std::vector<std::int64_t> ids = now.ids();
    const std::int64_t* removed = made->number % 4 == 1 ? ids.data() + ids.size() - kChanged : ids.data();
    for (std::int64_t i = 0; i < kChanged; ++i) made->present[removed[i]] = false;
    made->arrays = remove_items(from, removed, kChanged);
  }
  return made;
}

class Current {
 public:
  std::shared_ptr<const Version> get() {
    std::lock_guard<std::mutex> lock(mutex_);
    return version_;
  }
  void set(std::shared_ptr<const Version> next) {
    std::lock_guard<std::mutex> lock(mutex_);
    version_.swap(next);
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<const Version> version_ = first_version();
};

void walk_all(const Version& now) {
  const std::vector<std::int64_t> start(now.items(), 0);
  std::vector<std::int64_t> nodes(now.rows.size());
  walk(fuzz::view(now.arrays), now.rows.data(), start.data(), now.items(), kLevels, nodes.data(), 2);
  for (std::int64_t item = 0; item < now.items(); ++item) {
    const std::int64_t end = nodes[item * kLevels + 1 + item % 3], wanted = now.arrays.item_node.data()[item];
    require(end == wanted, "every item of the version that is read is found, and no other");
    require((wanted >= 0) == now.present[item], "an item that was removed ends nowhere");
  }
}

// Walks of a token at a time from the root, each in a row of its own, to the items that `may_end` names.
template <class Filter, class MayEnd>
void sample_all(const Version& now, const Filter& filter, const MayEnd& may_end) {
  const Trie trie = fuzz::view(now.arrays);
  const Catalogue catalogue = fuzz::catalogue(now.arrays);
  // Every row has the same logits.
  std::vector<float> values(kWide + 1);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 7);
  const Logits<float> logits{values.data(), kDraws, 1, kWide + 1, 0, 0, 1, 0};
  std::vector<std::int64_t> nodes(kDraws, 0), tokens(kDraws), reached(kDraws), last(kDraws, 0);
  std::vector<double> uniform(kDraws);
  std::vector<float> log_probs(kDraws);
  for (std::int64_t level = 0; level < kLevels; ++level) {
    for (std::int64_t b = 0; b < kDraws; ++b) uniform[b] = ((b * 7 + level * 3 + now.number) % kDraws + 0.5) / kDraws;
    sample(trie, filter, logits, nodes.data(), uniform.data(), 1.0, tokens.data(), reached.data(), log_probs.data(), 2);
    for (std::int64_t b = 0; b < kDraws; ++b)
      if (reached[b] >= 0) last[b] = reached[b];
    nodes = reached;
  }
  for (std::int64_t b = 0; b < kDraws; ++b) {
    const Catalogue::Ending ending = catalogue.ending_at(last[b]);
    require(ending.count == 1, "a draw ends at an item");
    require(now.present[*ending.begin] && may_end(b, *ending.begin), "a draw ends at an item that is available");
  }
}

// Row b gets no items of the parity of b, and of the others those that leave 1 divided by 3.
void sample_filtered(const Version& now) {
  const Catalogue catalogue = fuzz::catalogue(now.arrays);
  std::vector<std::int64_t> offsets{0}, excluded, members;
  for (std::int64_t b = 0; b < kDraws; ++b) {
    for (std::int64_t item = b % 2; item < now.items(); item += 2) excluded.push_back(b * now.items() + item);
    offsets.push_back(std::ssize(excluded));
  }
  for (std::int64_t item = 1; item < now.items(); item += 3) members.push_back(item);
  const std::int64_t words = (catalogue.trie.nodes + 31) / 32;
  std::vector<std::int32_t> items((now.items() + 31) / 32), nodes(words);
  const AllowedSet set{items.data(), nodes.data()};
  allow(catalogue, members.data(), std::ssize(members), set);
  const std::vector<AllowedSet> sets(kDraws, set);
  const HiddenNodes hidden = hidden_nodes(catalogue, offsets.data(), excluded.data(), kDraws, &sets, 2);
  const std::vector<std::int64_t> set_of_row(kDraws, 0);
  const ItemFilter filter{hidden.offsets.data(), hidden.nodes.data(), nodes.data(), set_of_row.data(), kDraws, words};
  sample_all(now, filter, [](std::int64_t b, std::int64_t item) { return item % 2 != b % 2 && item % 3 == 1; });
}

void read_flows(const Version& now) {
  const fuzz::ItemRanges ranges(now.arrays);
  const ItemTrie tree = ranges.tree(now.arrays);
  const std::vector<double> rewards(2 * now.items(), 0.0);
  std::vector<double> flows(2 * tree.trie.nodes);
  log_flows(tree, rewards.data(), 2, flows.data(), 2);
  const double wanted = std::log(static_cast<double>(now.ids().size()));
  require(std::abs(flows[tree.trie.nodes] - wanted) < 1e-12, "the root's flow is the sum");
}

void readers_while_the_catalogue_is_replaced() {
  Current current;
  std::atomic<bool> done = false;
  // Relaxed, for what is read may not be ordered after what was written by anything but `Current`.
  std::atomic<std::int64_t> reads = 0;
  std::vector<std::thread> readers;
  for (int reader = 0; reader < kReaders; ++reader)
    readers.emplace_back([&] {
      std::int64_t last = 0;
      while (!done) {
        const std::shared_ptr<const Version> now = current.get();
        require(now->number >= last, "versions do not go back");
        last = now->number;
        walk_all(*now);
        sample_all(*now, NoFilter{}, [](std::int64_t, std::int64_t) { return true; });
        sample_filtered(*now);
        read_flows(*now);
        reads.fetch_add(1, std::memory_order_relaxed);
      }
    });
  for (int version = 2; version <= kVersions; ++version) {
    current.set(next_version(*current.get()));
    const std::int64_t before = reads.load(std::memory_order_relaxed);
    while (reads.load(std::memory_order_relaxed) < before + kReaders) std::this_thread::yield();
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
}

std::int64_t sum_below(std::int64_t count, int threads) {
  std::atomic<std::int64_t> total = 0;
  parallel_for(count, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) total += i;
  });
  return total;
}

void concurrent_and_nested_calls() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kReaders; ++caller)
    callers.emplace_back([] {
      for (int round = 0; round < kRounds; ++round) {
        require(sum_below(100, 1 + round % 5) == 4950, "every index runs once");
        std::atomic<std::int64_t> total = 0;
        parallel_for(8, 1, 3, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) total += sum_below(10, 4);
        });
        require(total == 8 * 45, "a nested call runs every index once");
      }
    });
  for (std::thread& caller : callers) caller.join();
}

void failures_reach_the_caller() {
  for (int round = 0; round < kRounds; ++round) {
    bool caught = false;
    try {
      parallel_for(8, 1, 4, [&](std::int64_t begin, std::int64_t) {
        if (begin == 2 * (round % 4)) throw std::runtime_error("planned");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    require(caught, "a failure in a part reaches the caller");
    require(sum_below(100, 4) == 4950, "the pool works on after a failure");
  }
}

void forked_children() {
  for (int round = 0; round < 3; ++round) {
    const pid_t child = fork();
    require(child >= 0, "fork");
    if (child == 0) _exit(sum_below(1000, 4) == 499500 && sum_below(100, 3) == 4950 ? 0 : 1);
    int status = 1;
    waitpid(child, &status, 0);
    require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child has a pool of its own");
    require(sum_below(1000, 4) == 499500, "the parent's pool outlives the fork");
  }
}

}  // namespace
}  // namespace gflowgr

int main(int argc, char**) {
  gflowgr::readers_while_the_catalogue_is_replaced();
  gflowgr::concurrent_and_nested_calls();
  gflowgr::failures_reach_the_caller();
  // TSan refuses threads in the child of a process that has threads; the other builds run this.
  if (argc == 1) gflowgr::forked_children();
  std::puts("readers, callers, failures and forks: as they should be");
}
