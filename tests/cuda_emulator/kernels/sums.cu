// Sums of rows by one block each: warp sums, then the sum of these. What mutation tests break.

#include "element.h"
#include "reduce.h"

namespace sparsecod::cuda {
namespace {

constexpr int THREADS = 96;

using FloatsOfWarps = float[THREADS / WARP];
using FloatsOfThreads = float[THREADS];

__global__ void row_sums(const float* __restrict__ x, float* __restrict__ sums, int64_t rows, int64_t width) {
  SPARSECOD_SHARED(FloatsOfWarps, of_warps);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0;
    for (int64_t column = threadIdx.x; column < width; column += THREADS) sum += x[row * width + column];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = sum;
    __syncthreads();  // of_warps is written
    if (threadIdx.x == 0) sums[row] = of_warps[0] + of_warps[1] + of_warps[2];
    __syncthreads();  // of_warps has been read
  }
}

// Reverses each 32 elements through shared memory that only their warp sees.
__global__ void reverse_in_warps(const float* __restrict__ x, float* __restrict__ y) {
  SPARSECOD_SHARED(FloatsOfThreads, kept);
  const int lane = threadIdx.x % WARP, first = threadIdx.x - lane;
  kept[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = kept[first + WARP - 1 - lane];
}

}  // namespace
}  // namespace sparsecod::cuda

extern "C" cudaError_t row_sums(const float* x, float* sums, int64_t rows, int64_t width, cudaStream_t stream) {
  using namespace sparsecod::cuda;
  return SPARSECOD_LAUNCH(&sparsecod::cuda::row_sums, 2, THREADS, 0, stream, x, sums, rows, width);
}

extern "C" cudaError_t reverse_in_warps(const float* x, float* y, cudaStream_t stream) {
  using namespace sparsecod::cuda;
  return SPARSECOD_LAUNCH(&sparsecod::cuda::reverse_in_warps, 1, THREADS, 0, stream, x, y);
}
