#pragma once

#include <cstdint>

// The inner loops of a softmax over gathered values, built for several instruction sets and picked at run time.
namespace gflowgr {

// out = exp(values - peak), and their sum. `peak` is the largest value, so nothing overflows.
// In float each result is within 2 units in the last place, and 0 below 2^-126; NaN and a peak of +-inf give NaN.
double exp_differences(const float* values, std::int64_t count, float peak, float* out);
double exp_differences(const double* values, std::int64_t count, double peak, double* out);

// The first index at which the running sum of `mass` (none negative) exceeds `target`; the last one with mass where
// none does, for rounding may leave the target above the sum; 0 where there is no mass.
std::int64_t first_above(const float* mass, std::int64_t count, double target);
std::int64_t first_above(const double* mass, std::int64_t count, double target);

// The largest value, passing over NaN; -inf when there is none.
float largest(const float* values, std::int64_t count);
double largest(const double* values, std::int64_t count);

}  // namespace gflowgr
