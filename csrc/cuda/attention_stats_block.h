// What blocks of attention_stats.cu share: which queries and keys they take, how a weight counts, what they leave.

#pragma once

#include <limits>

#include "attention_stats.h"
#include "reduce.h"

namespace sparsecod::cuda::attention_stats {

constexpr int QUERIES = 128;  // of a block
constexpr int KEYS = 64;      // of a tile
// Thresholds in one pass. More take another: registers for them would slow down the usual four.
constexpr int COUNTS = 4;
constexpr double LOG2_E = 1.4426950408889634;

struct Partial {
  double entropy;
  int64_t counts[COUNTS];
};

struct Problem {
  AttentionShape shape;
  const float* lse;
  // Logarithms in the kernel are natural ones times `unit`, and so is lse made to be. The unit is near 1 or log2 e, but
  // such that the scale is exact: rounded, it would shift the logarithms of all weights alike.
  float scale;
  double unit;
  float log_thresholds[COUNTS];
  int32_t query_blocks;
  Partial* partials;  // [batch, heads, query_blocks]
};

// 2^x, 0 where that is subnormal.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(SPARSECOD_EMULATOR)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// What a thread has added up. Entropy is negative, and in the problem's unit, until the end.
struct Sums {
  double entropy = 0;
  int counts[COUNTS] = {};
};

// Where in the problem a block is: long blocks come first, so that short ones fill the gaps at the end.
struct Place {
  int64_t batch, head, kv_head, row;  // row of partials and lse
  int first_query, num_queries, num_keys;

  __device__ explicit Place(const Problem& problem) {
    const AttentionShape& shape = problem.shape;
    const int heads = shape.heads;
    const int query_block = problem.query_blocks - 1 - static_cast<int>(blockIdx.x) % problem.query_blocks;
    row = static_cast<int>(blockIdx.x) / problem.query_blocks;
    batch = static_cast<int>(row) / heads;
    head = static_cast<int>(row) % heads;
    kv_head = static_cast<int>(head) / (heads / static_cast<int>(shape.kv_heads));
    first_query = query_block * QUERIES;
    num_queries = shape.num_queries;
    num_keys = shape.num_keys;
  }

  // How many keys a query sees: the first ones.
  __device__ __forceinline__ int visible(const Problem& problem, int query) const {
    if (query >= num_queries) return 0;
    return problem.shape.causal ? num_keys - num_queries + query + 1 : num_keys;
  }

  // How many keys the queries up to `last`, not later than the last one there is, see together.
  __device__ __forceinline__ int visible_to_any(const Problem& problem, int first, int last) const {
    return first >= num_queries ? 0 : visible(problem, min(last, num_queries - 1));
  }

  __device__ __forceinline__ float lse(const Problem& problem, int query) const {
    return query < num_queries ? static_cast<float>(problem.lse[row * num_queries + query] * problem.unit) : 0;
  }
};

template <typename T>
__device__ __forceinline__ const T* rows(const void* first, const int64_t (&strides)[3], int64_t batch, int64_t head) {
  return static_cast<const T*>(first) + batch * strides[0] + head * strides[1];
}

// Adds one weight, given its logarithm and the factor that makes it one to base 2.
template <bool MASKED>
__device__ __forceinline__ void add_weight(float& entropy, int (&counts)[COUNTS], const float (&log_thresholds)[COUNTS],
                                           float log, bool is_visible, float to_log2 = 1) {
  const float weightless = -std::numeric_limits<float>::max();
  const float finite = !MASKED || is_visible ? log : weightless;
  entropy += exp2_fast(to_log2 == 1 ? finite : finite * to_log2) * finite;
#pragma unroll
  for (int i = 0; i < COUNTS; ++i) counts[i] += log < log_thresholds[i] && (!MASKED || is_visible);
}

// Leaves the sums of a block's threads as its partial.
template <int THREADS>
__device__ __forceinline__ void store_partial(const Problem& problem, const Place& place, const Sums& sums,
                                              Partial* of_warps) {
  constexpr int WARPS = THREADS / WARP;
  Partial mine;
  mine.entropy = warp_sum(-sums.entropy / problem.unit);
  for (int i = 0; i < COUNTS; ++i) mine.counts[i] = warp_sum(static_cast<int64_t>(sums.counts[i]));
  __syncthreads();  // the memory of of_warps may have served others
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < WARPS; ++warp) {
      mine.entropy += of_warps[warp].entropy;
      for (int i = 0; i < COUNTS; ++i) mine.counts[i] += of_warps[warp].counts[i];
    }
    problem.partials[place.row * problem.query_blocks + place.first_query / QUERIES] = mine;
  }
}

}  // namespace sparsecod::cuda::attention_stats
