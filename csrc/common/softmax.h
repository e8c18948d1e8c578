// Softmax attention and its tangent, one query at a time over blocks of keys, for CPU and CUDA kernels.
//
// With scores s_j, their tangents s'_j, values v_j and v'_j, and p_j = exp(s_j - max), attention and its tangent are
//   o  = sum p v / sum p
//   o' = sum p ((s' - c) v + v') / sum p,  c = sum p s' / sum p.
// Kernels accumulate the dual number (sum p v, sum p ((s' - c) v + v')), max and c those of the keys so far: when
// either changes, what was accumulated changes with it. Taking c into account at the end instead would cost digits
// where all s' of a query have much in common, or one key all the weight.
//
// Generic over V: float or double for one query, or a vector of lanes for several.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "dual.h"
#include "moments.h"

namespace sparsecod {

// 2^x in float32 for x <= 0, to a relative 2e-7; 0 below 2^-126.
template <typename V>
SPARSECOD_HOST_DEVICE V power_of_two(V x) {
#if defined(__CUDA_ARCH__)
  static_assert(std::is_same_v<V, float>);
  V power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else  // 2^n 2^f with n = round(x), which adding ROUNDER leaves in the lowest bits
  using Bits = std::conditional_t<std::is_same_v<V, float>, int32_t, decltype(x < x)>;
  constexpr float ROUNDER = 3 << 22;
  constexpr float TERMS[] = {1.0f,            6.931471806e-1f, 2.402265070e-1f, 5.550410866e-2f,  // ln(2)^k / k!
                             9.618129108e-3f, 1.333355815e-3f, 1.540353039e-4f, 1.525273380e-5f};
  const V rounded = x + ROUNDER, fraction = x - (rounded - ROUNDER);
  V power = V{} + TERMS[7];
  for (int k = 6; k >= 0; --k) power = power * fraction + TERMS[k];
  Bits bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits << 23) + (127 << 23);  // n in the exponent
  V scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < -126.0f ? V{} : power * scale;
#endif
}

// e^x for x <= 0.
template <typename V>
SPARSECOD_HOST_DEVICE V exponential(V x) {
  if constexpr (std::is_same_v<V, double>) {
    return std::exp(x);
  } else {
    return power_of_two<V>(x * 1.4426950409f);  // log2(e)
  }
}

template <typename V>
struct SoftmaxRow {
  V max;  // of the scores so far
  V sum;  // of p

  static SPARSECOD_HOST_DEVICE SoftmaxRow empty() { return {V{} - std::numeric_limits<float>::infinity(), V{}}; }

  // First the largest score of the next keys is taken in, which their weights need. Returns the factor by which earlier
  // weights shrink.
  SPARSECOD_HOST_DEVICE V raise(V largest) {
    const V before = max;
    max = larger(largest, max);
    return exponential<V>(before - max);
  }

  // p.
  SPARSECOD_HOST_DEVICE V weigh(V score) const { return exponential<V>(score - max); }

  // Then the sum of their p is.
  SPARSECOD_HOST_DEVICE void add(V factor, V weights) { sum = sum * factor + weights; }

  // o or o', given what was accumulated.
  SPARSECOD_HOST_DEVICE V output(V accumulated) const { return accumulated * (1 / sum); }

  // ln sum exp(s).
  SPARSECOD_HOST_DEVICE V log_sum_exp() const { return max + std::log(sum); }
};

// One of the tangents of a row: each has a c of its own.
template <typename V>
struct SoftmaxTangent {
  V sum;   // of p s'
  V mean;  // c

  // What becomes of what was accumulated.
  struct Change {
    V factor, shift;

    SPARSECOD_HOST_DEVICE Dual<V> operator()(Dual<V> accumulated) const {
      return {factor * accumulated.value, factor * accumulated.tangent + shift * accumulated.value};
    }
  };

  // Takes in the sum of p s' of the next keys, after `row` has their p.
  SPARSECOD_HOST_DEVICE Change add(const SoftmaxRow<V>& row, V factor, V weighted_tangents) {
    sum = sum * factor + weighted_tangents;
    const V before = mean;
    mean = sum / row.sum;
    return {factor, factor * (before - mean)};
  }

  // p (s' - c).
  SPARSECOD_HOST_DEVICE V weigh(V weight, V score_tangent) const { return weight * (score_tangent - mean); }
};

}  // namespace sparsecod
