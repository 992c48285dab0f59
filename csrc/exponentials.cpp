#include "exponentials.hpp"

#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define GFLOWGR_DISPATCHED __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#endif
#ifndef GFLOWGR_DISPATCHED
#define GFLOWGR_DISPATCHED
#endif
#define GFLOWGR_INLINE __attribute__((always_inline)) inline

namespace gflowgr {
namespace {

// Vectors of the compiler's (GCC's and Clang's): whatever the instruction set, an operation is one on all lanes. A
// cast keeps the bits. How they are passed depends on the instruction set, so only inlined functions may take them.
constexpr std::int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kLanes)));

constexpr float kNothing = -std::numeric_limits<float>::infinity();

GFLOWGR_INLINE Floats load(const float* values) {
  Floats lanes;
  std::memcpy(&lanes, values, sizeof lanes);
  return lanes;
}

// The first `count` values, then -inf.
GFLOWGR_INLINE Floats load_some(const float* values, std::int64_t count) {
  Floats lanes = Floats{} + kNothing;
  std::memcpy(&lanes, values, count * sizeof(float));
  return lanes;
}

GFLOWGR_INLINE double sum_of(const Floats& lanes) {
  float parts[kLanes];
  std::memcpy(parts, &lanes, sizeof lanes);
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2)
    for (std::int64_t lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
  return parts[0];
}

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2; exp(r) is its Taylor polynomial of degree 7.
GFLOWGR_INLINE Floats exp_at_most_one(const Floats& x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Floats shifted = x * kLog2E + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * kLn2High) - n * kLn2Low;
  Floats p = Floats{} + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits exponent = (Bits)shifted - 0x4b400000u;  // the bits of kRound
  const Bits scale = (exponent + 127u) << 23;
  const Floats result = p * (Floats)scale;
  return x < -87.3365479f ? Floats{} : result;
}

GFLOWGR_INLINE double exp_all(const float* values, std::int64_t count, float peak, float* out) {
  Floats total{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats lanes = exp_at_most_one(load(values + i) - peak);
    std::memcpy(out + i, &lanes, sizeof lanes);
    total += lanes;
  }
  if (i < count) {
    const Floats lanes = exp_at_most_one(load_some(values + i, count - i) - peak);
    std::memcpy(out + i, &lanes, (count - i) * sizeof(float));
    total += lanes;
  }
  return sum_of(total);
}

GFLOWGR_INLINE float largest_of(const float* values, std::int64_t count) {
  Floats best = Floats{} + kNothing;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats lanes = load(values + i);
    best = lanes > best ? lanes : best;
  }
  if (i < count) {
    const Floats lanes = load_some(values + i, count - i);
    best = lanes > best ? lanes : best;
  }
  float found = kNothing;
  for (std::int64_t lane = 0; lane < kLanes; ++lane) found = best[lane] > found ? best[lane] : found;
  return found;
}

// Leaves out whole blocks that do not reach the target: their sums do not wait for one another.
GFLOWGR_INLINE std::int64_t skip_blocks(const float* mass, std::int64_t i, std::int64_t count, std::int64_t vectors,
                                        double target, double& reached) {
  for (; i + vectors * kLanes <= count; i += vectors * kLanes) {
    Floats lanes = load(mass + i);
    for (std::int64_t vector = 1; vector < vectors; ++vector) lanes += load(mass + i + vector * kLanes);
    const double block = sum_of(lanes);
    if (reached + block > target) return i;
    reached += block;
  }
  return i;
}

template <class S>
GFLOWGR_INLINE std::int64_t scan(const S* mass, std::int64_t i, std::int64_t count, double target, double reached) {
  for (; i < count; ++i) {
    reached += mass[i];
    if (reached > target && mass[i] > 0) return i;
  }
  for (i = count - 1; i > 0 && !(mass[i] > 0);) --i;
  return i;
}

}  // namespace

GFLOWGR_DISPATCHED double exp_differences(const float* values, std::int64_t count, float peak, float* out) {
  return exp_all(values, count, peak, out);
}

double exp_differences(const double* values, std::int64_t count, double peak, double* out) {
  double total = 0;
  for (std::int64_t i = 0; i < count; ++i) total += out[i] = std::exp(values[i] - peak);
  return total;
}

GFLOWGR_DISPATCHED std::int64_t first_above(const float* mass, std::int64_t count, double target) {
  double reached = 0;
  std::int64_t i = skip_blocks(mass, 0, count, 8, target, reached);
  i = skip_blocks(mass, i, count, 1, target, reached);
  return scan(mass, i, count, target, reached);
}

std::int64_t first_above(const double* mass, std::int64_t count, double target) {
  return scan(mass, 0, count, target, 0.0);
}

GFLOWGR_DISPATCHED float largest(const float* values, std::int64_t count) { return largest_of(values, count); }

double largest(const double* values, std::int64_t count) {
  double best = -std::numeric_limits<double>::infinity();
  for (std::int64_t i = 0; i < count; ++i) best = values[i] > best ? values[i] : best;
  return best;
}

}  // namespace gflowgr
