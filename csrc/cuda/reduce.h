// Sums and maxima over the threads of a warp, the same bits in every lane and from run to run.

#pragma once

#include "launch.h"

namespace sparsecod::cuda {

template <typename V>
__device__ __forceinline__ V warp_sum(V x) {
#pragma unroll
  for (int bits = WARP / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, bits);
  return x;
}

template <typename V>
__device__ __forceinline__ V warp_max(V x) {
#pragma unroll
  for (int bits = WARP / 2; bits > 0; bits /= 2) {
    const V other = __shfl_xor_sync(WHOLE_WARP, x, bits);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace sparsecod::cuda
