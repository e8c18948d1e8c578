#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace sparsecod::cuda {

// Queries [batch, heads, num_queries, head_dim] and keys [batch, kv_heads, num_keys, head_dim], whose head_dim is
// contiguous, with strides in elements of the other three dimensions. In bfloat16 and float16 rows are aligned to 16
// bytes, and head_dim is one of supported_head_dim.
struct AttentionShape {
  int64_t batch, heads, kv_heads, num_queries, num_keys, head_dim;
  int64_t q_strides[3], k_strides[3];
  int32_t causal;  // the last query sees all keys, each one before it one key less; otherwise all see all
};

constexpr bool supported_head_dim(int64_t head_dim) { return head_dim % 8 == 0 && head_dim >= 32 && head_dim <= 256; }

}  // namespace sparsecod::cuda

// Bytes that sparsecod_attention_stats wants for its own use.
extern "C" int64_t sparsecod_attention_stats_scratch(const sparsecod::cuda::AttentionShape* shape);

// lse [batch, heads, num_queries] -> entropy [batch, heads], counts [batch, heads, num_thresholds], all contiguous.
// Nothing is empty but the thresholds, at most 8; they and the shape are on the host and are read before this returns.
extern "C" cudaError_t sparsecod_attention_stats(const void* q, const void* k, const float* lse,
                                                 sparsecod::cuda::Dtype dtype,
                                                 const sparsecod::cuda::AttentionShape* shape, double scale,
                                                 const double* thresholds, int64_t num_thresholds, void* scratch,
                                                 double* entropy, int64_t* counts, cudaStream_t stream);
