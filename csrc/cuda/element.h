// Elements of tensors in CUDA kernels: float32 and back, and 16 bytes of neighbours at a time.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "dtype.h"
#include "launch.h"

namespace sparsecod::cuda {

__device__ __forceinline__ float to_real(float x) { return x; }
__device__ __forceinline__ float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_real(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_real(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Neighbours that are loaded and stored 16 bytes at a time where they fill that, else one by one.
template <typename T, int N = 16 / sizeof(T)>
struct Pack {
  static constexpr int COUNT = N;
  T elements[N];

  static __device__ __forceinline__ Pack load(const T* from) {
    Pack pack;
    if constexpr (sizeof(Pack) % 16 == 0) {
      uint4 bits[sizeof(Pack) / 16];
      for (unsigned i = 0; i < sizeof(Pack) / 16; ++i) bits[i] = reinterpret_cast<const uint4*>(from)[i];
      std::memcpy(&pack, bits, sizeof(pack));
    } else {
      for (int i = 0; i < N; ++i) pack.elements[i] = from[i];
    }
    return pack;
  }

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (sizeof(Pack) % 16 == 0) {
      uint4 bits[sizeof(Pack) / 16];
      std::memcpy(bits, this, sizeof(bits));
      for (unsigned i = 0; i < sizeof(Pack) / 16; ++i) reinterpret_cast<uint4*>(to)[i] = bits[i];
    } else {
      for (int i = 0; i < N; ++i) to[i] = elements[i];
    }
  }
};

// Whether rows of `width` elements that start at `pointers` can be taken 16 bytes at a time.
template <typename T, typename... Pointers>
bool in_packs(int64_t width, Pointers... pointers) {
  return width % Pack<T>::COUNT == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls `body` with a value of the element type that `dtype` names.
#define SPARSECOD_DISPATCH_DTYPE(dtype, T, ...)                                                   \
  [&]() -> cudaError_t {                                                                          \
    switch (dtype) {                                                                              \
      case ::sparsecod::cuda::Dtype::FLOAT32: { using T = float; return __VA_ARGS__(); }          \
      case ::sparsecod::cuda::Dtype::BFLOAT16: { using T = __nv_bfloat16; return __VA_ARGS__(); } \
      case ::sparsecod::cuda::Dtype::FLOAT16: { using T = __half; return __VA_ARGS__(); }         \
    }                                                                                             \
    return cudaErrorInvalidValue;                                                                 \
  }()

}  // namespace sparsecod::cuda
