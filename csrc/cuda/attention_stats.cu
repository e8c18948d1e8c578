// Entropy of attention weights, and how many are below thresholds, per head, from queries, keys and log-sum-exp.
//
// A block takes 128 queries of one head past the keys they see, tile by tile; exponents of weights never leave the
// registers. Blocks leave partial sums, which a second kernel adds in order: the same bits from run to run.

#include "attention_stats.h"

#include <cmath>
#include <limits>

#include "../common/thresholds.h"
#include "mma.h"
#include "reduce.h"

namespace sparsecod::cuda {
namespace {

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

// On tensor cores. A warp holds 32 queries in registers for good and takes 32 keys at a time; logarithms are to base 2.
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

// In float32, in outer products of 8 queries and 4 keys per thread; logarithms are natural.
struct Float32 {
  static constexpr int THREADS = 256, ROWS = 8, COLUMNS = 4;
  static constexpr int ACROSS = KEYS / COLUMNS;  // threads side by side
  static_assert(THREADS / ACROSS * ROWS == QUERIES);
  static constexpr int DEPTH = 16;  // of head_dim at a time
  static constexpr int PADDING = 4;

  struct Shared {
    union {
      struct {
        float queries[DEPTH][QUERIES + PADDING], keys[DEPTH][KEYS + PADDING];
      };
      Partial of_warps[THREADS / WARP];
    };
  };

  template <int COUNT>
  static __device__ __forceinline__ void load_rows(float (&shared)[DEPTH][COUNT + PADDING], const float* from,
                                                   int64_t stride, int first, int end, int first_column,
                                                   int head_dim) {
    for (int i = threadIdx.x; i < COUNT * DEPTH; i += THREADS) {
      const int row = i / DEPTH, column = i % DEPTH;
      const bool valid = first + row < end && first_column + column < head_dim;
      shared[column][row] = valid ? from[(first + row) * stride + first_column + column] : 0;
    }
  }

  template <bool MASKED>
  static __device__ __forceinline__ void add_products(Sums& sums, const float (&products)[ROWS][COLUMNS],
                                                      const float (&lse)[ROWS], const Problem& problem,
                                                      const Place& place, int first_query, int first_key) {
    const float to_log2 = static_cast<float>(LOG2_E / problem.unit);
    float entropy = 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int visible = MASKED ? place.visible(problem, first_query + i) : 0;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        add_weight<MASKED>(entropy, sums.counts, problem.log_thresholds, products[i][j] * problem.scale - lse[i],
                           first_key + j < visible, to_log2);
      }
    }
    sums.entropy += entropy;
  }

  static __device__ __forceinline__ void run(const Problem& problem, const void* q, const void* k, Shared& shared) {
    const Place place(problem);
    const float* const queries = rows<float>(q, problem.shape.q_strides, place.batch, place.head);
    const float* const keys = rows<float>(k, problem.shape.k_strides, place.batch, place.kv_head);
    const int head_dim = problem.shape.head_dim;
    const int row = threadIdx.x / ACROSS * ROWS, column = threadIdx.x % ACROSS * COLUMNS;
    const int first_query = place.first_query + row;
    float lse[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      lse[i] = place.lse(problem, first_query + i);
    }
    const int last = first_query + ROWS - 1;
    const int visible_to_all = last < place.num_queries ? place.visible(problem, first_query) : 0;
    const int visible_to_thread = place.visible_to_any(problem, first_query, last);
    const int visible_to_block =
        place.visible_to_any(problem, place.first_query, place.first_query + QUERIES - 1);
    Sums sums;
    for (int first_key = 0; first_key < visible_to_block; first_key += KEYS) {
      float products[ROWS][COLUMNS] = {};
      for (int depth = 0; depth < head_dim; depth += DEPTH) {
        __syncthreads();
        load_rows<QUERIES>(shared.queries, queries, problem.shape.q_strides[2], place.first_query, place.num_queries,
                           depth, head_dim);
        load_rows<KEYS>(shared.keys, keys, problem.shape.k_strides[2], first_key, place.num_keys, depth, head_dim);
        __syncthreads();
#pragma unroll 4
        for (int d = 0; d < DEPTH; ++d) {
#pragma unroll
          for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
              products[i][j] += shared.queries[d][row + i] * shared.keys[d][column + j];
            }
          }
        }
      }
      if (first_key + column + COLUMNS <= visible_to_all) {
        add_products<false>(sums, products, lse, problem, place, first_query, first_key + column);
      } else if (first_key + column < visible_to_thread) {
        add_products<true>(sums, products, lse, problem, place, first_query, first_key + column);
      }
    }
    store_partial<THREADS>(problem, place, sums, shared.of_warps);
  }
};

template <typename T, int MAX_DIM>
__global__ void __launch_bounds__(TensorCores<T, MAX_DIM>::THREADS, MAX_DIM <= 128 ? 3 : 2)
    attention_stats(const __grid_constant__ Problem problem, const void* q, const void* k) {
  SPARSECOD_DYNAMIC_SHARED(memory);
  TensorCores<T, MAX_DIM>::run(problem, q, k, memory);
}

__global__ void __launch_bounds__(Float32::THREADS)
    attention_stats_float32(const __grid_constant__ Problem problem, const void* q, const void* k) {
  SPARSECOD_SHARED(Float32::Shared, shared);
  Float32::run(problem, q, k, shared);
}

// Adds a head's partials. A block is a warp, and takes one head.
__global__ void __launch_bounds__(WARP)
    add_partials(const Partial* partials, int query_blocks, double* entropy, int64_t* counts, int num_counts,
                 int64_t pitch) {
  const Partial* of_head = partials + static_cast<int64_t>(blockIdx.x) * query_blocks;
  Partial total = {};
  for (int i = threadIdx.x; i < query_blocks; i += WARP) {
    total.entropy += of_head[i].entropy;
#pragma unroll
    for (int j = 0; j < COUNTS; ++j) total.counts[j] += of_head[i].counts[j];
  }
  total.entropy = warp_sum(total.entropy);
#pragma unroll
  for (int j = 0; j < COUNTS; ++j) total.counts[j] = warp_sum(total.counts[j]);
  if (threadIdx.x == 0) {
    entropy[blockIdx.x] = total.entropy;
#pragma unroll
    for (int j = 0; j < COUNTS; ++j) {
      if (j < num_counts) counts[blockIdx.x * pitch + j] = total.counts[j];
    }
  }
}

template <typename T, int MAX_DIM>
cudaError_t launch(const Problem& problem, const void* q, const void* k, unsigned blocks, cudaStream_t stream) {
  using Block = TensorCores<T, MAX_DIM>;
  const auto kernel = &attention_stats<T, MAX_DIM>;
  SPARSECOD_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Block::SHARED_BYTES));
  return SPARSECOD_LAUNCH(kernel, blocks, Block::THREADS, Block::SHARED_BYTES, stream, problem, q, k);
}

template <typename T>
cudaError_t launch_any_dim(const Problem& problem, const void* q, const void* k, unsigned blocks,
                           cudaStream_t stream) {
  const int64_t head_dim = problem.shape.head_dim;
  if constexpr (std::is_same_v<T, float>) {
    return SPARSECOD_LAUNCH(&attention_stats_float32, blocks, Float32::THREADS, 0, stream, problem, q, k);
  } else {
    if (!supported_head_dim(head_dim)) return cudaErrorInvalidValue;
    if (head_dim <= 64) return launch<T, 64>(problem, q, k, blocks, stream);
    if (head_dim <= 96) return launch<T, 96>(problem, q, k, blocks, stream);
    if (head_dim <= 128) return launch<T, 128>(problem, q, k, blocks, stream);
    if (head_dim <= 192) return launch<T, 192>(problem, q, k, blocks, stream);
    return launch<T, 256>(problem, q, k, blocks, stream);
  }
}

int64_t blocks_per_head(const AttentionShape& shape) { return (shape.num_queries + QUERIES - 1) / QUERIES; }

}  // namespace
}  // namespace sparsecod::cuda

int64_t sparsecod_attention_stats_scratch(const sparsecod::cuda::AttentionShape* shape) {
  using namespace sparsecod::cuda;
  return shape->batch * shape->heads * blocks_per_head(*shape) * static_cast<int64_t>(sizeof(Partial));
}

cudaError_t sparsecod_attention_stats(const void* q, const void* k, const float* lse, sparsecod::cuda::Dtype dtype,
                                      const sparsecod::cuda::AttentionShape* shape, double scale,
                                      const double* thresholds, int64_t num_thresholds, void* scratch,
                                      double* entropy, int64_t* counts, cudaStream_t stream) {
  using namespace sparsecod::cuda;
  const int64_t heads = shape->batch * shape->heads, blocks = heads * blocks_per_head(*shape);
  if (blocks > INT32_MAX || shape->num_keys > INT32_MAX - KEYS) return cudaErrorInvalidConfiguration;
  const double wanted_unit = dtype == Dtype::FLOAT32 ? 1 : LOG2_E;
  const float rounded_scale = static_cast<float>(scale * wanted_unit);
  const double unit = scale == 0 ? wanted_unit : rounded_scale / scale;
  Problem problem = {*shape, lse, rounded_scale, unit, {}, static_cast<int32_t>(blocks_per_head(*shape)),
                     static_cast<Partial*>(scratch)};
  for (int64_t first = 0; first == 0 || first < num_thresholds; first += COUNTS) {
    const int of_pass = static_cast<int>(num_thresholds - first < COUNTS ? num_thresholds - first : COUNTS);
    for (int i = 0; i < COUNTS; ++i) {
      problem.log_thresholds[i] = i < of_pass ? static_cast<float>(std::log(thresholds[first + i]) * unit)
                                              : -std::numeric_limits<float>::infinity();
    }
    SPARSECOD_RETURN_IF_ERROR(SPARSECOD_DISPATCH_DTYPE(
        dtype, T, [&] { return launch_any_dim<T>(problem, q, k, static_cast<unsigned>(blocks), stream); }));
    SPARSECOD_RETURN_IF_ERROR(SPARSECOD_LAUNCH(&add_partials, static_cast<unsigned>(heads), WARP, 0, stream,
                                               problem.partials, problem.query_blocks, entropy, counts + first,
                                               of_pass, num_thresholds));
  }
  return cudaSuccess;
}
