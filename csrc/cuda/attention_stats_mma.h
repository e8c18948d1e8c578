// A block of attention_stats.cu in bfloat16 or float16, on tensor cores.

#pragma once

#include "attention_stats_block.h"
#include "mma.h"

namespace sparsecod::cuda::attention_stats {

// A warp holds 32 queries in registers for good and takes 32 keys at a time; logarithms are to base 2.
template <typename T, int MAX_DIM>
struct TensorCores {
  static constexpr int THREADS = 128, ROWS = 32, FRAGMENTS = ROWS / 16;  // of queries
  static_assert(THREADS / WARP * ROWS == QUERIES);
  static constexpr int COLUMNS = 32, PRODUCTS = COLUMNS / 8;
  static constexpr int STEPS = MAX_DIM / 16;
  static constexpr int PITCH = MAX_DIM + 8;  // of a row in shared memory: eight rows lie in different banks
  static constexpr int CHUNKS = MAX_DIM / 8;  // of 16 bytes in a row
  static constexpr size_t SHARED_BYTES = sizeof(T) * QUERIES * PITCH;
  static_assert(QUERIES == 2 * KEYS, "queries, once, and two tiles of keys share memory");

  // Starts to copy `count` rows, zeros beyond those that there are and beyond head_dim.
  static __device__ __forceinline__ void copy_rows(T* shared, const T* from, int64_t stride, int first, int count,
                                                   int end, int head_dim) {
#pragma unroll 4
    for (int i = threadIdx.x; i < count * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, column = i % CHUNKS * 8;
      const bool valid = first + row < end && column < head_dim;
      copy_async(shared + row * PITCH + column, valid ? from + (first + row) * stride + column : from, valid);
    }
    commit_copies();
  }

  template <bool MASKED>
  static __device__ __forceinline__ void add_products(float (&entropy)[FRAGMENTS][2], int (&counts)[COUNTS],
                                                      const FragmentD (&products)[FRAGMENTS][PRODUCTS],
                                                      const float (&lse)[FRAGMENTS][2],
                                                      const int (&visible)[FRAGMENTS][2], const Problem& problem,
                                                      int first_key) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < FRAGMENTS; ++m) {
#pragma unroll
      for (int n = 0; n < PRODUCTS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = first_key + n * 8 + lane % 4 * 2 + i % 2;
          add_weight<MASKED>(entropy[m][i / 2], counts, problem.log_thresholds,
                             products[m][n][i] * problem.scale - lse[m][i / 2], key < visible[m][i / 2]);
        }
      }
    }
  }

  static __device__ __forceinline__ void run(const Problem& problem, const void* q, const void* k,
                                             unsigned char* memory) {
    const Place place(problem);
    T* const shared = reinterpret_cast<T*>(memory);
    const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * ROWS;
    const int head_dim = problem.shape.head_dim;

    copy_rows(shared, rows<T>(q, problem.shape.q_strides, place.batch, place.head), problem.shape.q_strides[2],
              place.first_query, QUERIES, place.num_queries, head_dim);
    wait_for_copies<0>();
    __syncthreads();
    // Lane 8 i + j points to row j of matrix i: in which eight rows and which eight columns that lies.
    const int lane_row = lane % 8, first_bit = lane / 8 % 2 * 8, second_bit = lane / 16 * 8;
    FragmentA queries[FRAGMENTS][STEPS];
#pragma unroll
    for (int m = 0; m < FRAGMENTS; ++m) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        load_matrices<false>(queries[m][step], shared + (warp_row + m * 16 + lane_row + first_bit) * PITCH +
                                                   step * 16 + second_bit);
      }
    }
    __syncthreads();  // keys overwrite the queries

    float lse[FRAGMENTS][2];
    int visible[FRAGMENTS][2];
#pragma unroll
    for (int m = 0; m < FRAGMENTS; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = place.first_query + warp_row + m * 16 + half * 8 + lane / 4;
        visible[m][half] = place.visible(problem, query);
        lse[m][half] = place.lse(problem, query);
      }
    }
    const int first = place.first_query + warp_row, last = first + ROWS - 1;
    const int visible_to_all = last < place.num_queries ? place.visible(problem, first) : 0;
    const int visible_to_warp = place.visible_to_any(problem, first, last);
    const int visible_to_block =
        place.visible_to_any(problem, place.first_query, place.first_query + QUERIES - 1);

    const T* const keys = rows<T>(k, problem.shape.k_strides, place.batch, place.kv_head);
    const int64_t key_stride = problem.shape.k_strides[2];
    Sums sums;
    copy_rows(shared, keys, key_stride, 0, KEYS, place.num_keys, head_dim);
    for (int first_key = 0, buffer = 0; first_key < visible_to_block; first_key += KEYS, buffer ^= 1) {
      wait_for_copies<0>();
      __syncthreads();  // the tile is here, and nobody reads the one before it any more
      if (first_key + KEYS < visible_to_block) {
        copy_rows(shared + (buffer ^ 1) * KEYS * PITCH, keys, key_stride, first_key + KEYS, KEYS, place.num_keys,
                  head_dim);
      }
      const T* const tile = shared + buffer * KEYS * PITCH;
      float entropy[FRAGMENTS][2] = {};
#pragma unroll 1
      for (int column = 0; column < KEYS; column += COLUMNS) {
        if (first_key + column >= visible_to_warp) break;
        FragmentD products[FRAGMENTS][PRODUCTS] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
          for (int n = 0; n < PRODUCTS; n += 2) {
            uint32_t both[4];
            load_matrices<false>(both, tile + (column + n * 8 + lane_row + second_bit) * PITCH + step * 16 + first_bit);
            const FragmentB left = {both[0], both[1]}, right = {both[2], both[3]};
#pragma unroll
            for (int m = 0; m < FRAGMENTS; ++m) {
              multiply<T>(products[m][n], queries[m][step], left);
              multiply<T>(products[m][n + 1], queries[m][step], right);
            }
          }
        }
        if (first_key + column + COLUMNS <= visible_to_all) {
          add_products<false>(entropy, sums.counts, products, lse, visible, problem, first_key + column);
        } else {
          add_products<true>(entropy, sums.counts, products, lse, visible, problem, first_key + column);
        }
      }
      sums.entropy += (entropy[0][0] + entropy[0][1]) + (entropy[1][0] + entropy[1][1]);
    }
    store_partial<THREADS>(problem, place, sums, reinterpret_cast<Partial*>(memory));
  }
};

}  // namespace sparsecod::cuda::attention_stats
