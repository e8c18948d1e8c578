// RMSNorm along a tangent: the maths of one row, that is one token's D columns, for CPU and CUDA kernels.
//
//   y = w r x,  r = (mean_j x_j^2 + eps)^(-1/2),  r' = -r^3 mean_j x_j x'_j,  y' = w (r' x + r x')
//
// Accumulators are generic over V: float or double, or a vector of lanes.

#pragma once

#include <cmath>

#include "dual.h"
#include "host_device.h"

namespace sparsecod {

// Sums of x^2 and of x x', which is half the tangent of x^2.
template <typename V>
struct RmsNormSums {
  V square{}, product{};

  SPARSECOD_HOST_DEVICE void add(Dual<V> x) {
    square += x.value * x.value;
    product += x.value * x.tangent;
  }
};

// r and r' of a row of `width` columns.
template <typename Real>
SPARSECOD_HOST_DEVICE Dual<Real> rms_norm_scale(const RmsNormSums<Real>& sums, Real width, Real eps) {
  const Real r = 1 / std::sqrt(sums.square / width + eps);
  return {r, -r * (r * (r * (sums.product / width)))};  // r^3 alone may overflow
}

template <typename V>
SPARSECOD_HOST_DEVICE Dual<V> rms_norm(Dual<V> x, Dual<V> scale, V weight) {
  const Dual<V> normed = x * scale;
  return {normed.value * weight, normed.tangent * weight};
}

}  // namespace sparsecod
