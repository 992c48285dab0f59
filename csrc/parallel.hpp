#pragma once

#include <cstdint>
#include <functional>

namespace gflowgr {

// Splits [0, count) into at most `threads` contiguous ranges of at least `grain` and runs `body(begin, end)` on
// each. Ranges are run by a pool that survives a fork; nested or concurrent calls run on the calling thread.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace gflowgr
