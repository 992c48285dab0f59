// What TSan watches: readers of a trie while others replace it, and parallel_for called from many threads, nested,
// failing, and after a fork. Not a fuzzer; scripts/sanitize.sh builds and runs it.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "build.hpp"
#include "flows.hpp"
#include "parallel.hpp"
#include "policy.hpp"

namespace gflowgr {
namespace {

constexpr int kReaders = 3, kVersions = 40, kRounds = 40;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}

struct Catalogue {
  std::int64_t version;
  std::vector<std::int64_t> rows;
  TrieArrays arrays;
};

// Version v has the items [v, i, i + v] for i below 64, so a mixture of two versions would be seen.
std::shared_ptr<const Catalogue> catalogue(std::int64_t version) {
  auto made = std::make_shared<Catalogue>();
  made->version = version;
  for (std::int64_t item = 0; item < 64; ++item)
    for (const std::int64_t token : {version, item, item + version}) made->rows.push_back(token);
  made->arrays = build_trie(made->rows.data(), 64, 3);
  return made;
}

Trie view(const Catalogue& from) {
  return {from.arrays.first_child.data(), from.arrays.token.data(),
          static_cast<std::int64_t>(from.arrays.token.size())};
}

class Current {
 public:
  std::shared_ptr<const Catalogue> get() {
    std::lock_guard<std::mutex> lock(mutex_);
    return catalogue_;
  }
  void set(std::shared_ptr<const Catalogue> next) {
    std::lock_guard<std::mutex> lock(mutex_);
    catalogue_.swap(next);
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<const Catalogue> catalogue_ = catalogue(1);
};

void read_once(const Catalogue& now) {
  const Trie trie = view(now);
  const std::vector<std::int64_t> start(64, 0);
  std::vector<std::int64_t> nodes(now.rows.size()), tokens(64), reached(64);
  walk(trie, now.rows.data(), start.data(), 64, 3, nodes.data(), 2);
  for (std::int64_t item = 0; item < 64; ++item)
    require(nodes[item * 3 + 2] == now.arrays.item_node[item], "every item of the version that is read is found");

  const std::int64_t width = 64 + kVersions + 1;
  std::vector<float> logits(64 * width), log_probs(64), dense(64 * width);
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 7);
  const Logits<float> all{logits.data(), 64, 1, width, width, width, 1, 0};
  const std::vector<std::int64_t> second(64, 1);
  const std::vector<double> uniform(64, 0.5);
  sample(trie, NoFilter{}, all, second.data(), uniform.data(), 1.0, tokens.data(), reached.data(), log_probs.data(), 2);
  log_softmax(trie, NoFilter{}, all, second.data(), dense.data(), 2);
  for (const std::int64_t node : reached) require(node >= 2 && node < 66, "a draw ends at a child");

  const ItemTrie tree{trie, now.arrays.first_item.data(), now.arrays.item_count.data(), now.arrays.item_order.data(),
                      64};
  const std::vector<double> rewards(2 * 64, 0.0);
  std::vector<double> flows(2 * trie.nodes);
  log_flows(tree, rewards.data(), 2, flows.data(), 2);
  require(std::abs(flows[trie.nodes] - std::log(64.0)) < 1e-12, "the root's flow is the sum");
}

void readers_while_the_catalogue_is_replaced() {
  Current current;
  std::atomic<bool> done = false;
  std::vector<std::thread> readers;
  for (int reader = 0; reader < kReaders; ++reader)
    readers.emplace_back([&] {
      std::int64_t last = 0;
      while (!done) {
        const std::shared_ptr<const Catalogue> now = current.get();
        require(now->version >= last, "versions do not go back");
        last = now->version;
        read_once(*now);
      }
    });
  for (std::int64_t version = 2; version <= kVersions; ++version) current.set(catalogue(version));
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
