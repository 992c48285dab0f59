#include "parallel.hpp"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace gflowgr {
namespace {

// This thread runs a task: a call from within it may not ask the pool, whose lock it may hold.
thread_local bool busy_here = false;

class Pool {
 public:
  // Runs task(0) .. task(tasks - 1), the last one here; false when another thread is using the pool, or the system
  // has no threads to give.
  bool run(int tasks, const std::function<void(int)>& task) {
    if (busy_here) return false;
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; workers_ < tasks - 1; ++workers_) std::thread(&Pool::work, this, workers_, round_).detach();
      } catch (const std::system_error&) {
        return false;
      }
      task_ = &task;
      tasks_ = tasks;
      pending_ = tasks - 1;
      failure_ = nullptr;
      ++round_;
    }
    wake_.notify_all();
    attempt(tasks - 1, task);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    if (failure_) std::rethrow_exception(failure_);
    return true;
  }

 private:
  void attempt(int index, const std::function<void(int)>& task) {
    busy_here = true;
    try {
      task(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      failure_ = std::current_exception();
    }
    busy_here = false;
  }

  void work(int index, std::uint64_t seen) {
    for (;;) {
      const std::function<void(int)>* task = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (index < tasks_ - 1) task = task_;
      }
      if (task == nullptr) continue;
      attempt(index, *task);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* task_ = nullptr;
  int tasks_ = 0, pending_ = 0, workers_ = 0;
  std::uint64_t round_ = 0;
  std::exception_ptr failure_;
};

// Never freed: its threads wait on it until the process ends. A forked child has none of them, so it starts anew.
Pool* pool = nullptr;
std::once_flag once;

Pool& the_pool() {
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (count <= 0) return;
  const std::int64_t parts =
      std::clamp<std::int64_t>(count / std::max<std::int64_t>(grain, 1), 1, std::max(threads, 1));
  const auto part = [&](std::int64_t index) { body(count * index / parts, count * (index + 1) / parts); };
  if (parts > 1 && the_pool().run(static_cast<int>(parts), [&](int index) { part(index); })) return;
  body(0, count);
}

}  // namespace gflowgr
