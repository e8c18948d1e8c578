// Kernels whose values cannot all stay in registers: what the check of spills is tested with.

#include <cuda_runtime.h>

namespace sparsecod::cuda {
namespace {

// 2 x 1024 threads leave each 32 registers, for 96 values that are all read before the first is used.
template <int COUNT>
__global__ void __launch_bounds__(1024, 2) spills(const volatile float* x, volatile float* y) {
  float kept[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) kept[i] = x[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = COUNT - 1; i >= 0; --i) y[i * 1024 + threadIdx.x] = kept[i];
}

// spills: an array that is indexed by what is not known before it runs
// has to lie in memory, and here that is what is wanted.
__global__ void __launch_bounds__(128)
    indexes(const float* x, const int* at, float* y) {
  float kept[16];
  for (int i = 0; i < 16; ++i) kept[i] = x[i * 128 + threadIdx.x];
  kept[at[threadIdx.x] & 15] = 0;
  for (int i = 0; i < 16; ++i) y[i] = kept[at[i] & 15];
}

__global__ void fits(const float* x, float* y) { y[threadIdx.x] = 2 * x[threadIdx.x]; }

}  // namespace
}  // namespace sparsecod::cuda

void launch(const float* x, const int* at, float* y) {
  using namespace sparsecod::cuda;
  spills<96><<<1, 1024>>>(x, y);
  indexes<<<1, 128>>>(x, at, y);
  fits<<<1, 32>>>(x, y);
}
