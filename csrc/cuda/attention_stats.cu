// Entropy of attention weights, and how many are below thresholds, per head, from queries, keys and log-sum-exp.
//
// A block takes 128 queries of one head past the keys they see, tile by tile; exponents of weights never leave the
// registers. Blocks leave partial sums, which a second kernel adds in order: the same bits from run to run.

#include "attention_stats.h"

#include <cmath>
#include <limits>

#include "attention_stats_block.h"
#include "attention_stats_mma.h"
#include "element.h"

namespace sparsecod::cuda::attention_stats {
namespace {

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
    on_tensor_cores(const __grid_constant__ Problem problem, const void* q, const void* k) {
  SPARSECOD_DYNAMIC_SHARED(memory);
  TensorCores<T, MAX_DIM>::run(problem, q, k, memory);
}

__global__ void __launch_bounds__(Float32::THREADS)
    in_float32(const __grid_constant__ Problem problem, const void* q, const void* k) {
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
  const auto kernel = &on_tensor_cores<T, MAX_DIM>;
  SPARSECOD_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Block::SHARED_BYTES));
  return SPARSECOD_LAUNCH(kernel, blocks, Block::THREADS, Block::SHARED_BYTES, stream, problem, q, k);
}

template <typename T>
cudaError_t launch_any_dim(const Problem& problem, const void* q, const void* k, unsigned blocks,
                           cudaStream_t stream) {
  const int64_t head_dim = problem.shape.head_dim;
  if constexpr (std::is_same_v<T, float>) {
    return SPARSECOD_LAUNCH(&in_float32, blocks, Float32::THREADS, 0, stream, problem, q, k);
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
}  // namespace sparsecod::cuda::attention_stats

int64_t sparsecod_attention_stats_scratch(const sparsecod::cuda::AttentionShape* shape) {
  using namespace sparsecod::cuda::attention_stats;
  return shape->batch * shape->heads * blocks_per_head(*shape) * static_cast<int64_t>(sizeof(Partial));
}

cudaError_t sparsecod_attention_stats(const void* q, const void* k, const float* lse, sparsecod::cuda::Dtype dtype,
                                      const sparsecod::cuda::AttentionShape* shape, double scale,
                                      const double* thresholds, int64_t num_thresholds, void* scratch,
                                      double* entropy, int64_t* counts, cudaStream_t stream) {
  using namespace sparsecod::cuda;
  using namespace sparsecod::cuda::attention_stats;
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
