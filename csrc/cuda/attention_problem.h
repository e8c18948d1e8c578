// What the attention kernels are given, and which part of it a block takes.

#pragma once

#include "launch.h"

namespace sparsecod::cuda {

// A tensor [batch, head, row, head_dim] whose last dimension is contiguous. Strides are in elements.
struct AttentionTensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;

  template <typename T>
  __device__ __forceinline__ T* row(int batch, int head, int row) const {
    return static_cast<T*>(data) + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

// One block's work: a tile of queries of one head, and a part of the columns of its output.
struct AttentionTile {
  int batch, head, kv_head, first_query, column_part;
};

struct AttentionProblem {
  AttentionTensor q, k, v, q_tangent, k_tangent, v_tangent, output, output_tangent;
  float* log_sum_exp;
  int batch, heads, kv_heads, queries, keys, head_dim;
  float scale;
  bool causal;

  // Set by `schedule`.
  int tiles, column_parts, section;

  // Cuts the work into blocks of `tile` queries and returns their number, or 0 if there are too many.
  //
  // Heads are taken in sections whose keys and values stay in the L2 cache. Within a section, tiles with most keys come
  // first, so that the last blocks to finish are short, and what shares keys and values runs side by side.
  int64_t schedule(int tile, int parts, int64_t bytes_per_element) {
    constexpr int64_t L2_BYTES = int64_t{16} << 20;
    const int64_t bytes_per_head = 4 * int64_t{keys} * head_dim * bytes_per_element;
    const int64_t all = int64_t{batch} * kv_heads, fitting = L2_BYTES / bytes_per_head;
    section = static_cast<int>(fitting < 1 ? 1 : fitting < all ? fitting : all);
    tiles = (queries - 1) / tile + 1;
    column_parts = parts;
    const int64_t blocks = int64_t{batch} * heads * tiles * parts;
    return blocks > INT32_MAX ? 0 : blocks;
  }

  __device__ __forceinline__ AttentionTile tile(unsigned block, int queries_per_tile) const {
    const unsigned group = heads / kv_heads, per_tile = group * column_parts;
    const unsigned first_head = block / (section * tiles * per_tile) * section;
    const unsigned all_heads = batch * kv_heads;
    const unsigned here = all_heads - first_head < static_cast<unsigned>(section) ? all_heads - first_head : section;
    unsigned rest = block - first_head * tiles * per_tile;
    const unsigned heaviest = tiles - 1 - rest / (here * per_tile);
    rest %= here * per_tile;
    const unsigned kv_head = first_head + rest / per_tile;
    rest %= per_tile;
    AttentionTile tile;
    tile.batch = kv_head / kv_heads;
    tile.kv_head = kv_head % kv_heads;
    tile.head = tile.kv_head * group + rest / column_parts;
    tile.first_query = heaviest * queries_per_tile;
    tile.column_part = rest % column_parts;
    return tile;
  }

  // The last key that a query sees; queries beyond the last see as much as it does.
  __device__ __forceinline__ int last_key(int query) const {
    return causal && query < queries ? query + (keys - queries) : keys - 1;
  }
};

// Defined in flash_attention_jvp_mma.h and flash_attention_jvp_float32.cu. Head sizes up to D, of which there are few:
// tiles are padded with zeros.
template <typename T, int D>
cudaError_t launch_flash_attention_jvp_mma(AttentionProblem problem, cudaStream_t stream);
cudaError_t launch_flash_attention_jvp_float32(AttentionProblem problem, cudaStream_t stream);

}  // namespace sparsecod::cuda
