// One small kernel for each thing that the emulator claims to do or to catch.

#include "mma.h"

namespace sparsecod::cuda {
namespace {

using Ints1024 = int[1024];
using Ints64 = int[64];
using Floats64 = float[64];
using PacksOfWarp = float4[WARP];
using PacksOfGroups = float4[2 * WARP];
using Floats32 = float[32];
using Floats4096 = float[4096];

// Each thread writes what its right neighbour in a block of any shape brought.
__global__ void rotate(const int* x, int* y) {
  SPARSECOD_SHARED(Ints1024, kept);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  kept[thread] = x[thread];
  __syncthreads();
  y[thread] = kept[(thread + 1) % threads];
}

__global__ void rotate_in_place(int* x) { x[threadIdx.x] = x[(threadIdx.x + 1) % blockDim.x]; }

// y [5, threads]: what each kind of shuffle brings, and the ballot.
__global__ void shuffles(const int* x, int* y) {
  const int threads = blockDim.x * blockDim.y;
  const int thread = threadIdx.x + blockDim.x * threadIdx.y;
  const int mine = x[thread];
  y[thread] = __shfl_sync(WHOLE_WARP, mine, 5);
  y[threads + thread] = __shfl_xor_sync(WHOLE_WARP, mine, 3, 8);
  y[2 * threads + thread] = __shfl_down_sync(WHOLE_WARP, mine, 2);
  y[3 * threads + thread] = __shfl_up_sync(WHOLE_WARP, mine, 1, 16);
  y[4 * threads + thread] = static_cast<int>(__ballot_sync(WHOLE_WARP, mine % 3 == 0));
}

// Threads past `count` leave; the others still meet.
__global__ void some_leave(const int* x, int* y, int count) {
  SPARSECOD_SHARED(Ints64, kept);
  if (static_cast<int>(threadIdx.x) >= count) return;
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = kept[count - 1 - threadIdx.x];
}

enum Mistake : int {
  BARRIER_IN_A_BRANCH,
  DIFFERENT_BARRIERS,
  BARRIER_AND_SHUFFLE,
  DIFFERENT_COLLECTIVES,
  READS_BEFORE_THE_START,
  READS_PAST_THE_END,
  WRITES_PAST_THE_END,
  WRITES_JUST_PAST_THE_END,
  WRITES_ITS_INPUT,
  WRITES_PAST_SHARED,
  WRITES_PAST_DYNAMIC_SHARED,
  INDEXES_PAST_AN_ARRAY,
  LOADS_MISALIGNED,
  DECLARES_SHARED_TWICE,
  RECURSES_FOREVER,
  COPIES_OUTSIDE_SHARED,
};

__noinline__ int deeper(volatile int* x, int depth) {
  volatile int here[256];
  here[depth % 256] = x[0];
  return deeper(here, depth + 1) + here[0];
}

// x and y [64].
__global__ void mistaken(const float* x, float* y, int mistake) {
  SPARSECOD_SHARED(Floats64, kept);
  SPARSECOD_DYNAMIC_SHARED(bytes);
  const int thread = threadIdx.x;
  kept[thread] = 1;
  float value = 0;
  switch (mistake) {
    case BARRIER_IN_A_BRANCH:
      if (thread < 16) __syncthreads();
      __syncwarp();
      break;
    case DIFFERENT_BARRIERS:
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case BARRIER_AND_SHUFFLE:
      if (thread == 7) __syncthreads();
      value = __shfl_sync(WHOLE_WARP, value, 0);
      if (thread != 7) __syncthreads();
      break;
    case DIFFERENT_COLLECTIVES:
      value = thread < 8 ? __shfl_sync(WHOLE_WARP, value, 0) : __ballot_sync(WHOLE_WARP, 1);
      break;
    case READS_BEFORE_THE_START: value = x[thread - 4096]; break;
    case READS_PAST_THE_END: value = x[thread + 1]; break;
    case WRITES_PAST_THE_END: y[thread + 4] = 0; break;
    case WRITES_JUST_PAST_THE_END: y[thread - 1] = 0; break;
    case WRITES_ITS_INPUT: const_cast<float*>(x)[thread] = 0; break;
    case WRITES_PAST_SHARED: (&kept[0])[thread + 4] = 0; break;
    case WRITES_PAST_DYNAMIC_SHARED: reinterpret_cast<float*>(bytes)[thread + 4] = 0; break;
    case INDEXES_PAST_AN_ARRAY: value = kept[thread + 1]; break;
    case LOADS_MISALIGNED: value = Pack<float>::load(x + 1).elements[0]; break;
    case DECLARES_SHARED_TWICE: {
      SPARSECOD_SHARED(Floats64, other);
      other[thread] = 2;
      break;
    }
    case RECURSES_FOREVER: {
      volatile int start[1] = {thread};
      value = deeper(start, 0);
      break;
    }
    case COPIES_OUTSIDE_SHARED: copy_async(y, x); break;
  }
  y[thread] = value;
}

// y [32, 4]: what arrives of x [32, 4] in shared memory. The last lanes ask for zeros instead.
__global__ void copies(const float* x, float* y, bool wait) {
  SPARSECOD_SHARED(PacksOfWarp, kept);
  const int thread = threadIdx.x;
  copy_async(&kept[thread], x + 4 * thread, thread < 24);
  commit_copies();
  if (wait) wait_for_copies<0>();
  reinterpret_cast<float4*>(y)[thread] = kept[thread];
}

// Two groups of copies, [2, 32, 4] of x; only the first is waited for.
__global__ void copies_in_groups(const float* x, float* y) {
  SPARSECOD_SHARED(PacksOfGroups, kept);
  const int thread = threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    copy_async(&kept[WARP * group + thread], x + 4 * (WARP * group + thread));
    commit_copies();
  }
  wait_for_copies<1>();
  for (int i = thread; i < 2 * WARP; i += WARP) reinterpret_cast<float4*>(y)[i] = kept[i];
}

__global__ void reads_unwritten(float* y) {
  SPARSECOD_SHARED(Floats32, kept);
  y[threadIdx.x] = kept[threadIdx.x];
}

// y = x through as much dynamic shared memory as was asked for.
__global__ void through_dynamic(const float* x, float* y, int count) {
  SPARSECOD_DYNAMIC_SHARED(bytes);
  float* kept = reinterpret_cast<float*>(bytes);
  for (int i = threadIdx.x; i < count; i += WARP) kept[i] = x[i];
  __syncwarp();
  for (int i = threadIdx.x; i < count; i += WARP) y[i] = kept[count - 1 - i];
}

__global__ void static_and_dynamic(float* y) {
  SPARSECOD_SHARED(Floats4096, declared);
  SPARSECOD_DYNAMIC_SHARED(bytes);
  declared[threadIdx.x] = 1;
  reinterpret_cast<float*>(bytes)[threadIdx.x] = 2;
  __syncwarp();
  y[threadIdx.x] = declared[threadIdx.x];
}

// d [16, 8] += a [16, 16] b [16, 8], loaded by ldmatrix; b is stored by its columns if COLUMNS, else by rows.
template <typename T, bool COLUMNS>
__global__ void product(const T* a, const T* b, float* d) {
  struct Tiles {
    alignas(16) T a[16 * 16], b[16 * 8];
  };
  SPARSECOD_SHARED(Tiles, tiles);
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 16; i += WARP) tiles.a[i] = a[i];
  for (int i = lane; i < 16 * 8; i += WARP) tiles.b[i] = b[i];
  __syncwarp();
  FragmentA in_a;  // matrices: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
  load_matrices<false>(in_a, &tiles.a[(lane % 16) * 16 + lane / 16 * 8]);
  uint32_t both[4];
  if constexpr (COLUMNS) {
    load_matrices<false>(both, &tiles.b[lane % 8 * 16 + lane / 8 % 2 * 8]);
  } else {
    load_matrices<true>(both, &tiles.b[lane % 16 * 8]);
  }
  const FragmentB in_b = {both[0], both[1]};
  FragmentD sum = {d[lane / 4 * 8 + lane % 4 * 2], d[lane / 4 * 8 + lane % 4 * 2 + 1],
                   d[(lane / 4 + 8) * 8 + lane % 4 * 2], d[(lane / 4 + 8) * 8 + lane % 4 * 2 + 1]};
  multiply<T>(sum, in_a, in_b);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// Counts with an integer atomic; the last block to arrive writes, and resets the ticket.
__global__ void ticket(int* count, int* y) {
  if (threadIdx.x == 0 && atomicAdd(count, 1) == static_cast<int>(gridDim.x) - 1) {
    y[0] = gridDim.x;
    *count = 0;
  }
}

}  // namespace
}  // namespace sparsecod::cuda

extern "C" {
using namespace sparsecod::cuda;

cudaError_t launch_rotate(const int* x, int* y, int64_t width, int64_t height, int64_t depth, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&rotate, 1, dim3(width, height, depth), 0, stream, x, y);
}
cudaError_t launch_rotate_in_place(int* x, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&rotate_in_place, 1, 64, 0, stream, x);
}
cudaError_t launch_shuffles(const int* x, int* y, int64_t width, int64_t height, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&shuffles, 1, dim3(width, height), 0, stream, x, y);
}
cudaError_t launch_some_leave(const int* x, int* y, int64_t threads, int64_t count, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&some_leave, 1, threads, 0, stream, x, y, static_cast<int>(count));
}
cudaError_t launch_mistaken(const float* x, float* y, int64_t mistake, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&mistaken, 1, 64, 64 * sizeof(float), stream, x, y, static_cast<int>(mistake));
}
cudaError_t launch_copies(const float* x, float* y, bool wait, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&copies, 1, WARP, 0, stream, x, y, wait);
}
cudaError_t launch_copies_in_groups(const float* x, float* y, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&copies_in_groups, 1, WARP, 0, stream, x, y);
}
cudaError_t launch_reads_unwritten(float* y, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&reads_unwritten, 1, WARP, 0, stream, y);
}
cudaError_t launch_through_dynamic(const float* x, float* y, int64_t count, bool ask, cudaStream_t stream) {
  const auto kernel = ask ? &through_dynamic : static_cast<decltype(&through_dynamic)>(
      [](const float* x, float* y, int count) { through_dynamic(x, y, count); });
  if (ask) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    SPARSECOD_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(count * sizeof(float))));
  }
  return SPARSECOD_LAUNCH(kernel, 1, WARP, count * sizeof(float), stream, x, y, static_cast<int>(count));
}
cudaError_t launch_static_and_dynamic(float* y, int64_t dynamic_bytes, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&static_and_dynamic, 1, WARP, dynamic_bytes, stream, y);
}
cudaError_t launch_product(const void* a, const void* b, float* d, Dtype dtype, bool columns, cudaStream_t stream) {
  const auto launch = [&](auto* kernel, const auto* a, const auto* b) {
    return SPARSECOD_LAUNCH(kernel, 1, WARP, 0, stream, a, b, d);
  };
  using B = __nv_bfloat16;
  using H = __half;
  if (dtype == Dtype::BFLOAT16) {
    return launch(columns ? &product<B, true> : &product<B, false>, static_cast<const B*>(a), static_cast<const B*>(b));
  }
  return launch(columns ? &product<H, true> : &product<H, false>, static_cast<const H*>(a), static_cast<const H*>(b));
}
cudaError_t launch_ticket(int* count, int* y, int64_t blocks, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&ticket, static_cast<unsigned>(blocks), WARP, 0, stream, count, y);
}
cudaError_t launch_grid(int* y, int64_t grid, int64_t threads, cudaStream_t stream) {
  return SPARSECOD_LAUNCH(&some_leave, dim3(1, grid), threads, 0, stream, y, y, 0);
}
}
