// Sums over tokens of u, ||u||^2 and v . u, for several probes, in one pass over u. A block takes a tile of columns of
// a chunk of one probe's tokens; a second kernel adds the chunks up, in order.

#include "probe_moments.h"

#include "../common/probe_moments.h"
#include "element.h"
#include "reduce.h"

namespace sparsecod::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int ROWS = THREADS / WARP;  // tokens that a block loads at once, a warp each
constexpr int UNROLLED = 4;           // tokens whose loads a thread has under way
constexpr int TOKENS_PER_RUN = 32;    // of one thread: what it adds up in float32 before it goes to float64
constexpr int64_t MIN_TOKENS_PER_CHUNK = ROWS * UNROLLED * 2;
constexpr int64_t MAX_CHUNKS = 65535;  // in a grid's y
constexpr int64_t WAVES = 4;           // of blocks over the device, so that the last, which is not full, weighs little

// How the work is cut. It depends on the device, and the sums' last bits with it.
struct Plan {
  int64_t tiles, chunks, tokens_per_chunk;

  int64_t column_doubles(int64_t probes, int64_t width) const { return probes * chunks * width; }
  int64_t doubles(int64_t probes, int64_t width) const {
    return column_doubles(probes, width) + 2 * probes * chunks * tiles;
  }
};

template <int N>
struct Sums {
  double columns[N], squared_norm, product;
};

template <int N>
struct Shared {
  double columns[N][ROWS][WARP];
  double squared_norm[ROWS], product[ROWS];
};

// The sum of a double per thread, in thread 0.
__device__ __forceinline__ double block_sum(double x, double (&shared)[ROWS]) {
  x = warp_sum(x);
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  for (int warp = 1; warp < ROWS; ++warp) x += shared[warp];
  return x;
}

// Writes the chunk's sums of columns [probe, chunk, width], and of squared norms and products [probe, chunk, tile, 2].
template <typename T, int N, bool PER_TOKEN>
__global__ void __launch_bounds__(THREADS)
    add_chunk(const T* __restrict__ v, const T* __restrict__ u, double* __restrict__ column_sums,
              double* __restrict__ totals, int64_t tokens, int64_t width, int tiles, int64_t tokens_per_chunk) {
  SPARSECOD_SHARED(Shared<N>, shared);
  using Neighbours = Pack<T, N>;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t probe = blockIdx.x / static_cast<unsigned>(tiles), tile = blockIdx.x % static_cast<unsigned>(tiles);
  const int64_t chunk = blockIdx.y, chunks = gridDim.y;
  const int64_t column = (tile * WARP + lane) * N;
  const int64_t begin = chunk * tokens_per_chunk;
  const int64_t end = column < width ? min(begin + tokens_per_chunk, tokens) : 0;  // threads without columns add none

  Sums<N> sums{};
  for (int64_t run = begin + warp; run < end; run += ROWS * TOKENS_PER_RUN) {
    float run_columns[N]{};
    const int64_t run_end = min(run + ROWS * TOKENS_PER_RUN, end);
    for (int64_t token = run; token < run_end; token += ROWS * UNROLLED) {
      Neighbours of_u[UNROLLED], of_v[UNROLLED];
#pragma unroll
      for (int i = 0; i < UNROLLED; ++i) {
        if (token + i * ROWS < run_end) {
          const int64_t at = (probe * tokens + token + i * ROWS) * width + column;
          of_u[i] = Neighbours::load(u + at);
          if constexpr (PER_TOKEN) of_v[i] = Neighbours::load(v + at);
        }
      }
      // Longer sums of squares would round one way where tokens are nearly constant: from here they go on in float64.
      float squared_norm[UNROLLED]{}, product[UNROLLED]{};
#pragma unroll
      for (int i = 0; i < UNROLLED; ++i) {
        if (token + i * ROWS < run_end) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const float x = to_real(of_u[i].elements[j]);
            run_columns[j] += x;
            squared_norm[i] += x * x;
            if constexpr (PER_TOKEN) product[i] += x * to_real(of_v[i].elements[j]);
          }
        }
      }
      sums.squared_norm += (squared_norm[0] + squared_norm[1]) + (squared_norm[2] + squared_norm[3]);
      if constexpr (PER_TOKEN) sums.product += (product[0] + product[1]) + (product[2] + product[3]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sums.columns[j] += run_columns[j];
  }

#pragma unroll
  for (int j = 0; j < N; ++j) shared.columns[j][warp][lane] = sums.columns[j];
  __syncthreads();
  // From here on a warp has one of the N columns of every lane's pack.
  for (int j = warp; j < N; j += ROWS) {
    if (column + j < width) {
      double sum = 0;
      for (int row = 0; row < ROWS; ++row) sum += shared.columns[j][row][lane];
      column_sums[(probe * chunks + chunk) * width + column + j] = sum;
      if constexpr (!PER_TOKEN) sums.product += sum * to_real(v[probe * width + column + j]);
    }
  }
  const double squared_norm = block_sum(sums.squared_norm, shared.squared_norm);
  const double product = block_sum(sums.product, shared.product);
  if (threadIdx.x == 0) {
    double* of_block = totals + 2 * ((probe * chunks + chunk) * tiles + tile);
    of_block[0] = squared_norm;
    of_block[1] = product;
  }
}

struct MergeShared {
  double squared_norm[ROWS], product[ROWS];
};

// Adds all chunks to sums [probe, width] and moments [probe, 3].
__global__ void __launch_bounds__(THREADS)
    add_chunks_up(const double* __restrict__ column_sums, const double* __restrict__ totals, double* __restrict__ sums,
                  double* __restrict__ moments, int64_t tokens, int64_t width, int blocks_per_probe, int64_t chunks,
                  int64_t tiles) {
  SPARSECOD_SHARED(MergeShared, shared);
  const int64_t probe = blockIdx.x / static_cast<unsigned>(blocks_per_probe);
  const int64_t block = blockIdx.x % static_cast<unsigned>(blocks_per_probe);
  const int64_t column = block * THREADS + threadIdx.x;
  if (column < width) {
    const double* of_column = column_sums + probe * chunks * width + column;
    double sum = 0;
#pragma unroll 8
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += of_column[chunk * width];
    sums[probe * width + column] += sum;
  }
  if (block > 0) return;
  double squared_norm = 0, product = 0;
  for (int64_t i = threadIdx.x; i < chunks * tiles; i += THREADS) {
    const double* of_block = totals + 2 * (probe * chunks * tiles + i);
    squared_norm += of_block[0];
    product += of_block[1];
  }
  squared_norm = block_sum(squared_norm, shared.squared_norm);
  product = block_sum(product, shared.product);
  if (threadIdx.x == 0) {
    double* of_probe = moments + probe * ProbeMoment::COUNT;
    of_probe[ProbeMoment::SQUARED_NORM] += squared_norm;
    of_probe[ProbeMoment::PRODUCT] += product;
    of_probe[ProbeMoment::TOKENS] += static_cast<double>(tokens);
  }
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles are of packs of N columns. Chunks do not depend on N: so the workspace for single columns, which have more
// tiles, suffices for both.
template <typename T, int N>
cudaError_t make_plan(int64_t probes, int64_t tokens, int64_t width, Plan& plan) {
  int device, multiprocessors;
  SPARSECOD_RETURN_IF_ERROR(cudaGetDevice(&device));
  SPARSECOD_RETURN_IF_ERROR(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 4;
  const int64_t wanted = WAVES * BLOCKS_PER_MULTIPROCESSOR * multiprocessors;
  const int64_t chunks = divide_up(wanted, probes * divide_up(width, WARP * Pack<T>::COUNT));
  const int64_t most = divide_up(tokens, MIN_TOKENS_PER_CHUNK);
  plan.tokens_per_chunk = divide_up(tokens, min(min(chunks, most), MAX_CHUNKS));
  plan.tokens_per_chunk = divide_up(plan.tokens_per_chunk, ROWS * UNROLLED) * ROWS * UNROLLED;
  plan.chunks = divide_up(tokens, plan.tokens_per_chunk);
  plan.tiles = divide_up(width, WARP * N);
  return cudaSuccess;
}

template <typename T, int N>
cudaError_t launch(const T* v, const T* u, double* sums, double* moments, double* workspace, bool v_per_token,
                   int64_t probes, int64_t tokens, int64_t width, cudaStream_t stream) {
  Plan plan;
  SPARSECOD_RETURN_IF_ERROR((make_plan<T, N>(probes, tokens, width, plan)));
  const int64_t blocks_per_probe = divide_up(width, THREADS);
  if (probes * plan.tiles > INT32_MAX || probes * blocks_per_probe > INT32_MAX) return cudaErrorInvalidConfiguration;
  double* totals = workspace + plan.column_doubles(probes, width);
  const dim3 grid(static_cast<unsigned>(probes * plan.tiles), static_cast<unsigned>(plan.chunks));
  const auto add = v_per_token ? &add_chunk<T, N, true> : &add_chunk<T, N, false>;
  SPARSECOD_RETURN_IF_ERROR(SPARSECOD_LAUNCH(add, grid, THREADS, 0, stream, v, u, workspace, totals, tokens, width,
                                             static_cast<int>(plan.tiles), plan.tokens_per_chunk));
  const auto add_up = &add_chunks_up;
  return SPARSECOD_LAUNCH(add_up, static_cast<unsigned>(probes * blocks_per_probe), THREADS, 0, stream, workspace,
                          totals, sums, moments, tokens, width, static_cast<int>(blocks_per_probe), plan.chunks,
                          plan.tiles);
}

}  // namespace
}  // namespace sparsecod::cuda

cudaError_t sparsecod_probe_moments_workspace(sparsecod::cuda::Dtype dtype, int64_t probes, int64_t tokens,
                                              int64_t width, int64_t* doubles) {
  using namespace sparsecod::cuda;
  return SPARSECOD_DISPATCH_DTYPE(dtype, T, [&] {
    Plan plan;
    SPARSECOD_RETURN_IF_ERROR((make_plan<T, 1>(probes, tokens, width, plan)));
    *doubles = plan.doubles(probes, width);
    return cudaSuccess;
  });
}

cudaError_t sparsecod_probe_moments(const void* v, const void* u, double* sums, double* moments, double* workspace,
                                    sparsecod::cuda::Dtype dtype, bool v_per_token, int64_t probes, int64_t tokens,
                                    int64_t width, cudaStream_t stream) {
  using namespace sparsecod::cuda;
  return SPARSECOD_DISPATCH_DTYPE(dtype, T, [&] {
    const bool packed = in_packs<T>(width, u, v_per_token ? v : u);  // a shared v is read column by column
    const auto launch_packs = packed ? &launch<T, Pack<T>::COUNT> : &launch<T, 1>;
    return launch_packs(static_cast<const T*>(v), static_cast<const T*>(u), sums, moments, workspace, v_per_token,
                        probes, tokens, width, stream);
  });
}
