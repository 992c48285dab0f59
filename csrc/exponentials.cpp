#include "exponentials.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define GFLOWGR_DISPATCHED __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#endif
#ifndef GFLOWGR_DISPATCHED
#define GFLOWGR_DISPATCHED
#endif

namespace gflowgr {
namespace {

// Independent partial results, so that the compiler may use vector registers without reordering one sum.
constexpr std::int64_t kLanes = 16;

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2; exp(r) is its Taylor polynomial of degree 7.
inline float exp_at_most_one(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const std::int32_t exponent = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(kRound);
  const float scale = std::bit_cast<float>((static_cast<std::uint32_t>(exponent) + 127u) << 23);
  return x < -87.3365479f ? 0.0f : p * scale;
}

inline double exp_at_most_one(double x) { return std::exp(x); }

template <class S>
inline double exp_all(const S* values, std::int64_t count, S peak, S* out) {
  S lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      out[i + lane] = exp_at_most_one(values[i + lane] - peak);
      lanes[lane] += out[i + lane];
    }
  double total = 0;
  for (; i < count; ++i) total += out[i] = exp_at_most_one(values[i] - peak);
  for (const S lane : lanes) total += lane;
  return total;
}

template <class S>
inline S largest_of(const S* values, std::int64_t count) {
  S lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -std::numeric_limits<S>::infinity());
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (std::int64_t lane = 0; lane < kLanes; ++lane)
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
  S best = -std::numeric_limits<S>::infinity();
  for (; i < count; ++i) best = values[i] > best ? values[i] : best;
  for (const S lane : lanes) best = lane > best ? lane : best;
  return best;
}

}  // namespace

GFLOWGR_DISPATCHED double exp_differences(const float* values, std::int64_t count, float peak, float* out) {
  return exp_all(values, count, peak, out);
}

double exp_differences(const double* values, std::int64_t count, double peak, double* out) {
  return exp_all(values, count, peak, out);
}

GFLOWGR_DISPATCHED float largest(const float* values, std::int64_t count) { return largest_of(values, count); }

double largest(const double* values, std::int64_t count) { return largest_of(values, count); }

}  // namespace gflowgr
