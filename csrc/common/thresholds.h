// Thresholds that operators count magnitudes against.
//
// Without their sign bits, the bits of floating-point numbers order as the magnitudes do, and NaN comes above all. So
// |x| < threshold can compare integers: no conversion, and exact in every format.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace sparsecod {

constexpr int MAX_THRESHOLDS = 8;

struct FloatFormat {
  int exponent_bits, mantissa_bits;
};
constexpr FloatFormat FLOAT64_FORMAT = {11, 52}, FLOAT32_FORMAT = {8, 23};
constexpr FloatFormat BFLOAT16_FORMAT = {8, 7}, FLOAT16_FORMAT = {5, 10};

// The bits of the smallest magnitude that is not below `threshold`, at most those of infinity: |x| < threshold, as real
// numbers, for just those x whose magnitude has smaller bits. The threshold is positive, infinity included.
inline uint64_t bits_not_below(double threshold, FloatFormat format) {
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  const uint64_t infinity = ((uint64_t{1} << format.exponent_bits) - 1) << format.mantissa_bits;
  if (std::isinf(threshold)) return infinity;
  const int exponent = std::max(std::ilogb(threshold), 1 - bias);  // that of subnormal numbers is the smallest's
  if (exponent > bias) return infinity;
  // Of a normal number these are the mantissa with its leading one, which adds one to the exponent's bits.
  const uint64_t steps = static_cast<uint64_t>(std::ceil(std::ldexp(threshold, format.mantissa_bits - exponent)));
  return steps + (static_cast<uint64_t>(exponent + bias - 1) << format.mantissa_bits);
}

}  // namespace sparsecod
