// Dual numbers: a value and its derivative along a tangent, carried together (forward-mode differentiation).
//
// Generic over V: float or double, or a vector of lanes for arithmetic.

#pragma once

#include "host_device.h"

namespace sparsecod {

template <typename V>
struct Dual {
  V value, tangent;
};

template <typename V>
SPARSECOD_HOST_DEVICE Dual<V> operator+(Dual<V> a, Dual<V> b) {
  return {a.value + b.value, a.tangent + b.tangent};
}

template <typename V>
SPARSECOD_HOST_DEVICE Dual<V> operator*(Dual<V> a, Dual<V> b) {
  return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
}

// x * sigmoid(x), given sigmoid(x.value); its derivative is s + x s (1 - s).
template <typename V>
SPARSECOD_HOST_DEVICE Dual<V> silu(Dual<V> x, V sigmoid) {
  const V value = x.value * sigmoid;
  return {value, x.tangent * (sigmoid + value * (1 - sigmoid))};
}

}  // namespace sparsecod
