// Attention and its tangent on tensor cores, for 16-bit elements: FlashAttention-2 with dual numbers.
//
// A warp owns 16 queries. For each tile of keys it multiplies Q K^T, Q' K^T and Q K'^T into scores and their tangents,
// turns them into weights where they are (common/softmax.h), and multiplies those by V and V'. While it does so the
// next tile is on its way into the other half of shared memory.
//
// Above a head size of 128, accumulators of all output columns would not fit into registers: blocks take half of the
// columns each, and both compute the scores.

#pragma once

#include "../common/softmax.h"
#include "attention_problem.h"
#include "mma.h"

namespace sparsecod::cuda {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int WARP_QUERIES = 16, QUERIES = WARPS * WARP_QUERIES;
constexpr int CHUNK = 8;  // elements in 16 bytes

// ROWS rows of WIDTH elements in shared memory. Chunks of neighbouring rows are permuted so that eight rows' chunks of
// one column, which ldmatrix reads at once, lie in different banks.
template <typename T, int ROWS, int WIDTH>
struct SharedRows {
  static constexpr int CHUNKS = WIDTH / CHUNK, GROUP = CHUNKS % 8 == 0 ? 8 : 4;
  static_assert(CHUNKS % GROUP == 0);
  T elements[ROWS * WIDTH];

  static __device__ __forceinline__ int twist(int row) { return GROUP == 8 ? row % 8 : row / 2 % 4; }

  __device__ __forceinline__ T* at(int row, int chunk) {
    return elements + row * WIDTH + (chunk / GROUP * GROUP + (chunk % GROUP ^ twist(row))) * CHUNK;
  }

  // Loads the 8 x 8 matrices (0, 0), (8, 0), (0, 8), (8, 8) relative to row and column, multiples of 16.
  template <bool TRANSPOSED>
  __device__ __forceinline__ void load_down(uint32_t (&registers)[4], int row, int column) {
    const int lane = threadIdx.x % WARP;
    load<TRANSPOSED>(registers, row + lane % 16, lane / 16, column);
  }

  // Loads (0, 0), (0, 8), (8, 0), (8, 8).
  __device__ __forceinline__ void load_across(uint32_t (&registers)[4], int row, int column) {
    const int lane = threadIdx.x % WARP;
    load<false>(registers, row + lane / 16 * 8 + lane % 8, lane / 8 % 2, column);
  }

  // Starts to copy rows of global memory, and zeros beyond `rows` and `width`. A thread stays in its column of chunks,
  // so that it needs one pointer; where columns do not divide the threads, some have nothing to do.
  __device__ __forceinline__ void copy(const T* from, int64_t row_stride, int rows, int width) {
    constexpr int ROWS_AT_A_TIME = THREADS / CHUNKS;
    const int first_row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    if (THREADS % CHUNKS != 0 && first_row == ROWS_AT_A_TIME) return;
    const bool in_width = chunk * CHUNK < width;
    const T* source = from + first_row * row_stride + chunk * CHUNK;
#pragma unroll
    for (int i = 0; i < ROWS; i += ROWS_AT_A_TIME, source += ROWS_AT_A_TIME * row_stride) {
      const int row = i + first_row;
      if (ROWS % ROWS_AT_A_TIME != 0 && row >= ROWS) break;
      const bool valid = in_width && row < rows;
      copy_async(at(row, chunk), valid ? source : from, valid);
    }
  }

 private:
  // `half` is 0 or 1: it and the row depend on the lane, `column` does not, and only the last XOR depends on both.
  template <bool TRANSPOSED>
  __device__ __forceinline__ void load(uint32_t (&registers)[4], int row, int half, int column) {
    const int chunk = column / CHUNK, permuted = chunk % GROUP ^ (half ^ twist(row));
    load_matrices<TRANSPOSED>(registers, elements + row * WIDTH + (chunk / GROUP * GROUP + permuted) * CHUNK);
  }
};

template <typename T, int D>
struct Shared {
  static constexpr int COLUMNS = D <= 128 ? D : D / 2;            // of the output, for one block
  static constexpr int KEYS = D <= 64 ? 64 : D <= 128 ? 32 : 16;  // as many as registers and two blocks' memory allow

  struct Stage {
    SharedRows<T, KEYS, D> k, k_tangent;
    SharedRows<T, KEYS, COLUMNS> v, v_tangent;
  };

  SharedRows<T, QUERIES, D> q, q_tangent;
  Stage stages[2];
};

// A fragment of B out of the two that one ldmatrix loads.
__device__ __forceinline__ const FragmentB& half_of(const uint32_t (&registers)[4], int half) {
  return reinterpret_cast<const FragmentB&>(registers[2 * half]);
}

// Sums and maxima over the four lanes that share the rows of a fragment.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(WHOLE_WARP, x, 1);
  return x + __shfl_xor_sync(WHOLE_WARP, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 1));
  return fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 2));
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2)
    flash_attention_jvp_mma(const __grid_constant__ AttentionProblem problem) {
  using Memory = Shared<T, D>;
  constexpr int KEYS = Memory::KEYS, COLUMNS = Memory::COLUMNS;
  SPARSECOD_DYNAMIC_SHARED(bytes);
  Memory& shared = *reinterpret_cast<Memory*>(bytes);

  const AttentionTile tile = problem.tile(blockIdx.x, QUERIES);
  const int lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP * WARP_QUERIES;
  const int first_column = tile.column_part * COLUMNS, columns = problem.head_dim - first_column;
  const auto copy_tile = [&](typename Memory::Stage& stage, int first_key) {
    const int keys = problem.keys - first_key;
    const auto copy = [&](auto& rows, const AttentionTensor& tensor, int column, int width) {
      rows.copy(tensor.row<T>(tile.batch, tile.kv_head, first_key) + column, tensor.row_stride, keys, width);
    };
    copy(stage.k, problem.k, 0, problem.head_dim);
    copy(stage.k_tangent, problem.k_tangent, 0, problem.head_dim);
    copy(stage.v, problem.v, first_column, columns);
    copy(stage.v_tangent, problem.v_tangent, first_column, columns);
  };
  const auto copy_queries = [&](auto& rows, const AttentionTensor& tensor) {
    rows.copy(tensor.row<T>(tile.batch, tile.head, tile.first_query), tensor.row_stride,
              problem.queries - tile.first_query, problem.head_dim);
  };
  copy_queries(shared.q, problem.q);
  copy_queries(shared.q_tangent, problem.q_tangent);
  copy_tile(shared.stages[0], 0);
  commit_copies();

  // A lane holds elements of two rows, eight apart, of each fragment: index i is of row i / 2.
  const int query = tile.first_query + first_row + lane / 4;
  const int last_key[2] = {problem.last_key(query), problem.last_key(query + 8)};
  const int last_key_of_warp = problem.last_key(tile.first_query + first_row + WARP_QUERIES - 1);
  const int first_key_masked = problem.last_key(tile.first_query + first_row) + 1;
  const int last_key_of_block = problem.last_key(tile.first_query + QUERIES - 1);

  SoftmaxRow<float> rows[2] = {SoftmaxRow<float>::empty(), SoftmaxRow<float>::empty()};
  SoftmaxTangent<float> tangents[2] = {};
  FragmentD output[COLUMNS / 8] = {}, output_tangent[COLUMNS / 8] = {};

  for (int first_key = 0, turn = 0; first_key <= last_key_of_block; first_key += KEYS, turn ^= 1) {
    wait_for_copies<0>();
    __syncthreads();  // this tile has arrived, and nobody reads the tile before it any more
    if (first_key + KEYS <= last_key_of_block) copy_tile(shared.stages[turn ^ 1], first_key + KEYS);
    commit_copies();
    if (first_key > last_key_of_warp) continue;
    typename Memory::Stage& stage = shared.stages[turn];

    FragmentD score[KEYS / 8] = {}, score_tangent[KEYS / 8] = {};
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      FragmentA q, q_tangent;
      shared.q.template load_down<false>(q, first_row, d);
      shared.q_tangent.template load_down<false>(q_tangent, first_row, d);
#pragma unroll
      for (int key = 0; key < KEYS; key += 16) {
        uint32_t k[4], k_tangent[4];
        stage.k.load_across(k, key, d);
        stage.k_tangent.load_across(k_tangent, key, d);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = key / 8 + half;
          multiply<T>(score[at], q, half_of(k, half));
          multiply<T>(score_tangent[at], q_tangent, half_of(k, half));
          multiply<T>(score_tangent[at], q, half_of(k_tangent, half));
        }
      }
    }

#pragma unroll
    for (int at = 0; at < KEYS / 8; ++at) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[at][i] *= problem.scale;
        score_tangent[at][i] *= problem.scale;
      }
    }
    if (first_key + KEYS > first_key_masked) {
#pragma unroll
      for (int at = 0; at < KEYS / 8; ++at) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool seen = first_key + at * 8 + lane % 4 * 2 + i % 2 <= last_key[i / 2];
          score[at][i] = seen ? score[at][i] : -std::numeric_limits<float>::infinity();
          score_tangent[at][i] = seen ? score_tangent[at][i] : 0;
        }
      }
    }
    float largest[2] = {score[0][0], score[0][2]};
#pragma unroll
    for (int at = 0; at < KEYS / 8; ++at) {
#pragma unroll
      for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], score[at][i]);
    }
    SoftmaxTangent<float>::Change change[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float factor = rows[row].raise(quad_max(largest[row]));
      Dual<float> sums = {0, 0};
#pragma unroll
      for (int at = 0; at < KEYS / 8; ++at) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          score[at][i] = rows[row].weigh(score[at][i]);  // from here on a weight
          sums.value += score[at][i];
          sums.tangent += score[at][i] * score_tangent[at][i];
        }
      }
      rows[row].add(factor, quad_sum(sums.value));
      change[row] = tangents[row].add(rows[row], factor, quad_sum(sums.tangent));
    }
#pragma unroll
    for (int at = 0; at < COLUMNS / 8; ++at) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Dual<float> changed = change[i / 2]({output[at][i], output_tangent[at][i]});
        output[at][i] = changed.value;
        output_tangent[at][i] = changed.tangent;
      }
    }

#pragma unroll
    for (int key = 0; key < KEYS; key += 16) {
      FragmentA weight, weight_tangent;  // of the two fragments of scores that lie side by side
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = key / 8 + i / 2, row = i % 2;
        const float lower = score[at][2 * row], upper = score[at][2 * row + 1];
        weight[i] = pair<T>(lower, upper);
        weight_tangent[i] = pair<T>(tangents[row].weigh(lower, score_tangent[at][2 * row]),
                                    tangents[row].weigh(upper, score_tangent[at][2 * row + 1]));
      }
#pragma unroll
      for (int column = 0; column < COLUMNS; column += 16) {
        uint32_t v[4], v_tangent[4];
        stage.v.template load_down<true>(v, key, column);
        stage.v_tangent.template load_down<true>(v_tangent, key, column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = column / 8 + half;
          multiply<T>(output[at], weight, half_of(v, half));
          multiply<T>(output_tangent[at], weight_tangent, half_of(v, half));
          multiply<T>(output_tangent[at], weight, half_of(v_tangent, half));
        }
      }
    }
  }

  // Rows leave through the shared memory of this warp's own queries, to be written 16 bytes at a time.
  __syncwarp();
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int row_here = first_row + lane / 4 + 8 * row;
#pragma unroll
    for (int at = 0; at < COLUMNS / 8; ++at) {
      const auto write = [&](SharedRows<T, QUERIES, D>& to, const FragmentD& sums) {
        const uint32_t values = pair<T>(rows[row].output(sums[2 * row]), rows[row].output(sums[2 * row + 1]));
        std::memcpy(to.at(row_here, at) + lane % 4 * 2, &values, sizeof(values));
      };
      write(shared.q, output[at]);
      write(shared.q_tangent, output_tangent[at]);
    }
    if (lane % 4 == 0 && tile.column_part == 0 && query + 8 * row < problem.queries) {
      const int64_t head = static_cast<int64_t>(tile.batch) * problem.heads + tile.head;
      problem.log_sum_exp[head * problem.queries + query + 8 * row] = rows[row].log_sum_exp();
    }
  }
  __syncwarp();
  for (int i = lane; i < WARP_QUERIES * COLUMNS / CHUNK; i += WARP) {
    const int row = first_row + i / (COLUMNS / CHUNK), chunk = i % (COLUMNS / CHUNK);
    if (tile.first_query + row >= problem.queries || chunk * CHUNK >= columns) continue;
    const auto write = [&](SharedRows<T, QUERIES, D>& from, const AttentionTensor& to) {
      T* const start = to.row<T>(tile.batch, tile.head, tile.first_query + row) + first_column;
      Pack<T>::load(from.at(row, chunk)).store(start + chunk * CHUNK);
    };
    write(shared.q, problem.output);
    write(shared.q_tangent, problem.output_tangent);
  }
}

}  // namespace

template <typename T, int D>
cudaError_t launch_flash_attention_jvp_mma(AttentionProblem problem, cudaStream_t stream) {
  using Memory = Shared<T, D>;
  const auto kernel = &flash_attention_jvp_mma<T, D>;
  const int64_t blocks = problem.schedule(QUERIES, D / Memory::COLUMNS, sizeof(T));
  if (blocks == 0) return cudaErrorInvalidConfiguration;
  SPARSECOD_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Memory)));
  return SPARSECOD_LAUNCH(kernel, static_cast<unsigned>(blocks), THREADS, sizeof(Memory), stream, problem);
}

}  // namespace sparsecod::cuda
