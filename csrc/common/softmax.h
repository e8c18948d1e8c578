// Softmax attention and its tangent, one query at a time over blocks of keys, for CPU and CUDA kernels.
//
// With scores s_j, their tangents s'_j, values v_j and v'_j, and p_j = exp(s_j - max), attention and its tangent are
//   o  = sum p v / sum p
//   o' = sum p ((s' - c) v + v') / sum p - (sum p (s' - c) / sum p) o       for any c.
// Kernels accumulate the dual number (sum p v, sum p (s' - c) v + p v'). c is the mean tangent among the first keys:
// what all s' of a query have in common cancels, but in 16-bit factors of a product it would take the place of digits.
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
  V max;          // of the scores so far
  V sum;          // of p
  V tangent_sum;  // of p (s' - shift)
  V shift;

  static SPARSECOD_HOST_DEVICE SoftmaxRow empty() {
    return {V{} - std::numeric_limits<float>::infinity(), V{}, V{}, V{}};
  }

  // Takes in the largest score of the next keys. Returns the factor by which all that was accumulated shrinks; the
  // sums of this row have shrunk already.
  SPARSECOD_HOST_DEVICE V raise(V largest) {
    const V before = max;
    max = larger(largest, max);
    const V factor = exponential<V>(before - max);
    sum *= factor;
    tangent_sum *= factor;
    return factor;
  }

  // p and p (s' - shift).
  SPARSECOD_HOST_DEVICE Dual<V> weigh(Dual<V> score) const {
    const V weight = exponential<V>(score.value - max);
    return {weight, weight * (score.tangent - shift)};
  }

  SPARSECOD_HOST_DEVICE void add(Dual<V> weights) {
    sum += weights.value;
    tangent_sum += weights.tangent;
  }

  // Sets the shift, given the sums of the first keys' weights.
  SPARSECOD_HOST_DEVICE void centre(Dual<V> weights) { shift = weights.tangent / weights.value; }

  // o and o', given what was accumulated.
  SPARSECOD_HOST_DEVICE Dual<V> output(Dual<V> accumulated) const {
    const V inverse = 1 / sum, value = accumulated.value * inverse;
    return {value, (accumulated.tangent - tangent_sum * value) * inverse};
  }

  // ln sum exp(s).
  SPARSECOD_HOST_DEVICE V log_sum_exp() const { return max + std::log(sum); }
};

}  // namespace sparsecod
