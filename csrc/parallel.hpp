#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace gflowgr {

// Splits [0, count) into at most `threads` contiguous ranges of at least `grain` and runs `body(begin, end)` on
// each. Ranges are run by a pool that survives a fork; nested or concurrent calls run on the calling thread.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

// How many of [0, count) are worth waking a thread for, where `cost(i)`, in about nanoseconds, is asked of a few.
template <class Cost>
std::int64_t grain_of(std::int64_t count, const Cost& cost) {
  constexpr std::int64_t kAsked = 32, kLeast = 30'000;
  const std::int64_t asked = std::min(count, kAsked);
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < asked; ++i) total += cost(count * i / asked);
  return total > 0 ? 1 + kLeast * asked / total : std::max<std::int64_t>(count, 1);
}

}  // namespace gflowgr
