// Threads that work on one row together: a warp, or a block.
//
// Both kinds sum over their threads in a fixed order: the same bits from run to run.

#pragma once

#include "reduce.h"

namespace sparsecod::cuda {

constexpr int MAX_WARPS = 32;  // of a block

struct WarpGroup {
  static constexpr int MAX_THREADS = 256;  // of a block, which is several groups

  __device__ __forceinline__ static int size() { return WARP; }
  __device__ __forceinline__ static int rank() { return threadIdx.x % WARP; }
  __device__ __forceinline__ static int groups() { return blockDim.x / WARP; }
  __device__ __forceinline__ static int index() { return threadIdx.x / WARP; }

  // Every thread gets the N sums.
  template <int N>
  __device__ __forceinline__ static void sum(float (&x)[N], float*) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
  }

  // The first thread gets the N sums.
  template <int N>
  __device__ __forceinline__ static void sum_for_first(float (&x)[N], float* scratch) {
    sum(x, scratch);
  }
};

struct BlockGroup {
  static constexpr int MAX_THREADS = 512;

  __device__ __forceinline__ static int size() { return blockDim.x; }
  __device__ __forceinline__ static int rank() { return threadIdx.x; }
  __device__ __forceinline__ static int groups() { return 1; }
  __device__ __forceinline__ static int index() { return 0; }

  // Every thread gets the N sums. `scratch` takes N values a warp; another barrier must lie between two uses of it.
  template <int N>
  __device__ __forceinline__ static void sum(float (&x)[N], float* scratch) {
    gather(x, scratch);
    add_warps(x, scratch);
  }

  // The first thread gets the N sums.
  template <int N>
  __device__ __forceinline__ static void sum_for_first(float (&x)[N], float* scratch) {
    gather(x, scratch);
    if (threadIdx.x == 0) add_warps(x, scratch);
  }

 private:
  template <int N>
  __device__ __forceinline__ static void gather(float (&x)[N], float* scratch) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = warp_sum(x[i]);
      if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP * N + i] = x[i];
    }
    __syncthreads();
  }

  template <int N>
  __device__ __forceinline__ static void add_warps(float (&x)[N], const float* scratch) {
    const int warps = blockDim.x / WARP;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = scratch[i];
      for (int warp = 1; warp < warps; ++warp) x[i] += scratch[warp * N + i];
    }
  }
};

}  // namespace sparsecod::cuda
