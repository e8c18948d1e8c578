// Attention and its tangent in float32 throughout: no tensor cores, which would round the factors.
//
// A block takes QUERIES queries; its threads are 16 x 16. Thread (y, x) scores queries y and y + 16 against keys x,
// x + 16, ..., and accumulates the same queries' outputs in columns 4 x, 4 x + 1, ... of each 64. A query's threads
// are half a warp, so that its weights pass through shared memory without a barrier of the block. Sums are formed of a
// part of the columns or a tile of keys before they are added up: long chains of additions would round more.

#include "../common/softmax.h"
#include "attention_problem.h"
#include "mma.h"

namespace sparsecod::cuda {
namespace {

constexpr int SIDE = 16, THREADS = SIDE * SIDE, QUERIES = 2 * SIDE;
constexpr int QUAD = 4;            // elements in 16 bytes
constexpr int BAND = SIDE * QUAD;  // columns that the threads of a query cover at a time
constexpr int PART = 32;           // columns of the products that make a part of a score

// Rows in shared memory. The space between them lets sixteen threads read one column of sixteen rows, 16 bytes each, at
// full speed.
template <int ROWS, int D>
struct SharedRows {
  float elements[ROWS][D + QUAD];

  // Starts to copy rows of global memory, and zeros beyond `rows` and `width`.
  __device__ __forceinline__ void copy(const float* from, int64_t row_stride, int rows, int width) {
    for (int i = threadIdx.x; i < ROWS * (D / QUAD); i += THREADS) {
      const int row = i / (D / QUAD), column = i % (D / QUAD) * QUAD;
      const bool valid = row < rows && column < width;
      copy_async(elements[row] + column, valid ? from + row * row_stride + column : from, valid);
    }
  }
};

template <int D>
struct Shared {
  static constexpr int KEYS = D <= 128 ? 32 : 16;
  SharedRows<QUERIES, D> q, q_tangent;
  SharedRows<KEYS, D> k, k_tangent, v, v_tangent;
  float weight[QUERIES][KEYS], weight_tangent[QUERIES][KEYS];
};

// Sums and maxima over the threads of a query.
__device__ __forceinline__ float side_sum(float x) {
#pragma unroll
  for (int bits = SIDE / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, bits);
  return x;
}
__device__ __forceinline__ float side_max(float x) {
#pragma unroll
  for (int bits = SIDE / 2; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, bits));
  return x;
}

__device__ __forceinline__ float dot(const Pack<float>& a, const Pack<float>& b, float sum) {
#pragma unroll
  for (int i = 0; i < QUAD; ++i) sum += a.elements[i] * b.elements[i];
  return sum;
}

template <int D>
__global__ void __launch_bounds__(THREADS, 1)
    flash_attention_jvp_float32(const __grid_constant__ AttentionProblem problem) {
  using Memory = Shared<D>;
  constexpr int KEYS = Memory::KEYS, KEYS_EACH = KEYS / SIDE, BANDS = D / BAND;
  SPARSECOD_DYNAMIC_SHARED(bytes);
  Memory& shared = *reinterpret_cast<Memory*>(bytes);

  const AttentionTile tile = problem.tile(blockIdx.x, QUERIES);
  const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
  const auto copy_queries = [&](auto& rows, const AttentionTensor& tensor) {
    rows.copy(tensor.row<float>(tile.batch, tile.head, tile.first_query), tensor.row_stride,
              problem.queries - tile.first_query, problem.head_dim);
  };
  copy_queries(shared.q, problem.q);
  copy_queries(shared.q_tangent, problem.q_tangent);

  SoftmaxRow<float> rows[2] = {SoftmaxRow<float>::empty(), SoftmaxRow<float>::empty()};
  SoftmaxTangent<float> tangents[2] = {};
  Dual<float> output[2][BANDS][QUAD] = {};
  const int last_key_of_block = problem.last_key(tile.first_query + QUERIES - 1);
  for (int first_key = 0; first_key <= last_key_of_block; first_key += KEYS) {
    __syncthreads();  // nobody reads the tile before this one any more
    const auto copy_keys = [&](SharedRows<KEYS, D>& to, const AttentionTensor& tensor) {
      to.copy(tensor.row<float>(tile.batch, tile.kv_head, first_key), tensor.row_stride, problem.keys - first_key,
              problem.head_dim);
    };
    copy_keys(shared.k, problem.k);
    copy_keys(shared.k_tangent, problem.k_tangent);
    copy_keys(shared.v, problem.v);
    copy_keys(shared.v_tangent, problem.v_tangent);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();

    Dual<float> score[2][KEYS_EACH] = {};
    for (int first = 0; first < D; first += PART) {
      Dual<float> part[2][KEYS_EACH] = {};
      for (int d = first; d < first + PART; d += QUAD) {
        Pack<float> q[2], q_tangent[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          q[row] = Pack<float>::load(shared.q.elements[y + row * SIDE] + d);
          q_tangent[row] = Pack<float>::load(shared.q_tangent.elements[y + row * SIDE] + d);
        }
#pragma unroll
        for (int i = 0; i < KEYS_EACH; ++i) {
          const Pack<float> k = Pack<float>::load(shared.k.elements[x + i * SIDE] + d);
          const Pack<float> k_tangent = Pack<float>::load(shared.k_tangent.elements[x + i * SIDE] + d);
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            Dual<float>& s = part[row][i];
            s.value = dot(q[row], k, s.value);
            s.tangent = dot(q_tangent[row], k, dot(q[row], k_tangent, s.tangent));
          }
        }
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int i = 0; i < KEYS_EACH; ++i) score[row][i] = score[row][i] + part[row][i];
      }
    }

    SoftmaxTangent<float>::Change change[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int query = y + row * SIDE, last_key = problem.last_key(tile.first_query + query);
      float largest = -std::numeric_limits<float>::infinity();
#pragma unroll
      for (int i = 0; i < KEYS_EACH; ++i) {
        Dual<float>& s = score[row][i];
        const bool seen = first_key + x + i * SIDE <= last_key;
        s.value = seen ? s.value * problem.scale : -std::numeric_limits<float>::infinity();
        s.tangent = seen ? s.tangent * problem.scale : 0;
        largest = fmaxf(largest, s.value);
      }
      const float factor = rows[row].raise(side_max(largest));
      Dual<float> sums = {0, 0};
#pragma unroll
      for (int i = 0; i < KEYS_EACH; ++i) {
        Dual<float>& s = score[row][i];
        s.value = rows[row].weigh(s.value);  // from here on a weight
        sums = sums + Dual<float>{s.value, s.value * s.tangent};
      }
      rows[row].add(factor, side_sum(sums.value));
      change[row] = tangents[row].add(rows[row], factor, side_sum(sums.tangent));
#pragma unroll
      for (int i = 0; i < KEYS_EACH; ++i) {
        const Dual<float>& s = score[row][i];
        shared.weight[query][x + i * SIDE] = s.value;
        shared.weight_tangent[query][x + i * SIDE] = tangents[row].weigh(s.value, s.tangent);
      }
    }
    __syncwarp();

    Dual<float> part[2][BANDS][QUAD] = {};
    for (int key = 0; key < KEYS; ++key) {
      Dual<float> weight[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        weight[row] = {shared.weight[y + row * SIDE][key], shared.weight_tangent[y + row * SIDE][key]};
      }
#pragma unroll
      for (int band = 0; band < BANDS; ++band) {
        const Pack<float> v = Pack<float>::load(shared.v.elements[key] + band * BAND + x * QUAD);
        const Pack<float> v_tangent = Pack<float>::load(shared.v_tangent.elements[key] + band * BAND + x * QUAD);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
          for (int i = 0; i < QUAD; ++i) {
            const Dual<float> value = {v.elements[i], v_tangent.elements[i]};
            part[row][band][i] = part[row][band][i] + weight[row] * value;
          }
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int band = 0; band < BANDS; ++band) {
#pragma unroll
        for (int i = 0; i < QUAD; ++i) {
          Dual<float>& sum = output[row][band][i];
          sum = change[row](sum) + part[row][band][i];
        }
      }
    }
  }

#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int query = tile.first_query + y + row * SIDE;
    if (query >= problem.queries) continue;
    if (x == 0) {
      const int64_t head = static_cast<int64_t>(tile.batch) * problem.heads + tile.head;
      problem.log_sum_exp[head * problem.queries + query] = rows[row].log_sum_exp();
    }
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const int column = band * BAND + x * QUAD;
      if (column >= problem.head_dim) continue;
      Pack<float> values, value_tangents;
#pragma unroll
      for (int i = 0; i < QUAD; ++i) {
        values.elements[i] = rows[row].output(output[row][band][i].value);
        value_tangents.elements[i] = rows[row].output(output[row][band][i].tangent);
      }
      values.store(problem.output.row<float>(tile.batch, tile.head, query) + column);
      value_tangents.store(problem.output_tangent.row<float>(tile.batch, tile.head, query) + column);
    }
  }
}

template <int D>
cudaError_t launch(AttentionProblem problem, cudaStream_t stream) {
  const auto kernel = &flash_attention_jvp_float32<D>;
  const int64_t blocks = problem.schedule(QUERIES, 1, sizeof(float));
  if (blocks == 0) return cudaErrorInvalidConfiguration;
  SPARSECOD_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<D>)));
  return SPARSECOD_LAUNCH(kernel, static_cast<unsigned>(blocks), THREADS, sizeof(Shared<D>), stream, problem);
}

}  // namespace

cudaError_t launch_flash_attention_jvp_float32(AttentionProblem problem, cudaStream_t stream) {
  if (problem.head_dim <= 64) return launch<64>(problem, stream);
  if (problem.head_dim <= 128) return launch<128>(problem, stream);
  return launch<256>(problem, stream);
}

}  // namespace sparsecod::cuda
