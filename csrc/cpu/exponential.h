// e^x in lanes.
//
// With k the integer nearest to x / ln 2 and r = x - k ln 2, e^x = 2^k e^r, and e^r on [-ln 2 / 2, ln 2 / 2] is a
// polynomial. ln 2 is split so that k times its upper part is exact, with or without fused multiply-adds.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace sparsecod {

namespace exponential_constants {

constexpr float LOG2_E = 0x1.715476p0f;
constexpr float LN_2_UPPER = 0x1.63p-1f, LN_2_LOWER = -0x1.bd0106p-13f;  // the upper part has 9 bits, k at most 8
// Adding it rounds to an integer, which is then in the lower bits of the sum.
constexpr float ROUNDER = 0x1.8p23f;
// (e^r - 1 - r) / r^2, so fitted that the largest relative error of e^r is smallest: 0.06 units of 2^-24.
constexpr float COEFFICIENTS[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e4p-7f, 0x1.6a2436p-10f};
// Beyond these the result is 0, or infinite; between them the two powers of two below are in range.
constexpr float LOWEST = -104, HIGHEST = 89;

}  // namespace exponential_constants

// e^x to one unit in the last place, subnormal results included; NaN for NaN. In float64 it is the C library's.
template <typename Real, int N>
SPARSECOD_INLINE Lanes<Real, N> exponential(Lanes<Real, N> x) {
  if constexpr (std::is_same_v<Real, double>) {
    double lanes[N];
    std::memcpy(lanes, &x, sizeof(x));
    for (double& lane : lanes) lane = std::exp(lane);
    std::memcpy(&x, lanes, sizeof(x));
    return x;
  } else {
    using namespace exponential_constants;
    using Float = Lanes<float, N>;
    using Bits = Lanes<uint32_t, N>;
    constexpr int MANTISSA_BITS = 23;
    constexpr uint32_t BIAS = 127;
    x = smaller(Float{} + HIGHEST, larger(Float{} + LOWEST, x));  // in this order they let NaN through

    const Float shifted = x * LOG2_E + ROUNDER, k = shifted - ROUNDER;
    const Float r = (x - k * LN_2_UPPER) - k * LN_2_LOWER;
    Float fit = Float{} + COEFFICIENTS[4];
    for (int i = 3; i >= 0; --i) fit = fit * r + COEFFICIENTS[i];
    const Float power = (fit * (r * r) + r) + 1;

    // 2^k itself may be out of range, or subnormal, while its product with e^r is not: it comes as two factors.
    Bits rounded, rounder;
    std::memcpy(&rounded, &shifted, sizeof(rounded));
    const Float rounder_lanes = Float{} + ROUNDER;
    std::memcpy(&rounder, &rounder_lanes, sizeof(rounder));
    const Bits biased = rounded - rounder + 2 * BIAS;  // k + 2 BIAS, which is positive
    const Bits half = biased >> 1;
    const Bits first_bits = half << MANTISSA_BITS, second_bits = (biased - half) << MANTISSA_BITS;
    Float first, second;
    std::memcpy(&first, &first_bits, sizeof(first));
    std::memcpy(&second, &second_bits, sizeof(second));
    return power * first * second;
  }
}

}  // namespace sparsecod
