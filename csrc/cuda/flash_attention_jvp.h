#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

// q [batch, heads, queries, head_dim], k and v [batch, kv_heads, keys, head_dim], and their tangents
// -> output and output_tangent like q, and float32 log_sum_exp [batch, heads, queries], contiguous.
//
// `strides` [8, 3], on the host: of q, k, v, their tangents in this order, output and output_tangent, for the first
// three dimensions, in elements; the last is contiguous. Rows of tensors start at multiples of 16 bytes, head_dim is a
// multiple of 8 from 32 to 256, heads one of kv_heads. Tangents are those of `probes` probes, which lie `probe_strides`
// [4] apart: of q_tangent, k_tangent, v_tangent and output_tangent. If `causal`, query i sees keys up to
// i + keys - queries, which is not negative.
extern "C" cudaError_t sparsecod_flash_attention_jvp(const void* q, const void* k, const void* v, const void* q_tangent,
                                                     const void* k_tangent, const void* v_tangent, void* output,
                                                     void* output_tangent, float* log_sum_exp,
                                                     sparsecod::cuda::Dtype dtype, int64_t batch, int64_t heads,
                                                     int64_t kv_heads, int64_t queries, int64_t keys, int64_t head_dim,
                                                     const int64_t* strides, int64_t probes,
                                                     const int64_t* probe_strides, float scale, bool causal,
                                                     cudaStream_t stream);
