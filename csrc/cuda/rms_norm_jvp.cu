// y = w r x, with r = (mean x^2 + eps)^(-1/2), and its tangent. Rows are read once and stay in registers: narrow rows
// are shared by a part of a warp, wide ones by a block. Rows too wide for that, or not aligned, are read twice.

#include "rms_norm_jvp.h"

#include "../common/rms_norm.h"
#include "element.h"
#include "reduce.h"

namespace sparsecod::cuda {
namespace {

constexpr int PACKS = 2;  // of 16 bytes of each of x and x': what a thread keeps in registers
constexpr int NARROW_THREADS = 128;
constexpr int MIN_GROUP = 8;  // threads that share a narrow row: so many load 128 bytes at once
constexpr int MAX_WARPS = 32;

// 1024 threads of a multiprocessor have 64 registers each; that many keep the memory busy while some wait for the sum of
// their row. So the weight is not kept, but read from cache for every row. One wider than x takes more registers.
template <typename T, typename W, bool WHOLE_BLOCK>
struct Bounds {
  static constexpr bool LEAN = WHOLE_BLOCK && sizeof(W) == sizeof(T);
  static constexpr int RESIDENT = LEAN ? 1024 : 512, THREADS = WHOLE_BLOCK ? RESIDENT : NARROW_THREADS;
  static constexpr int BLOCKS = RESIDENT / THREADS;
};

template <typename T, typename W>
struct Arguments {
  const T* __restrict__ x;
  const T* __restrict__ x_tangent;
  const W* __restrict__ weight;
  T* __restrict__ y;
  T* __restrict__ y_tangent;
  int64_t rows;
  int width;
  float eps;
};

// The sums of all warps of a block, in each of its threads. `shared` is free again after the next call's barrier: two
// calls in a row need two.
__device__ __forceinline__ RmsNormSums<float> block_sum(RmsNormSums<float> sums,
                                                        RmsNormSums<float> (&shared)[MAX_WARPS]) {
  sums = {warp_sum(sums.square), warp_sum(sums.product)};
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = sums;
  __syncthreads();
  sums = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / WARP; ++warp) {
    sums.square += shared[warp].square;
    sums.product += shared[warp].product;
  }
  return sums;
}

// The sums of neighbouring threads; `group` of them, a power of two up to a warp, share a row.
__device__ __forceinline__ RmsNormSums<float> group_sum(RmsNormSums<float> sums, int group) {
  for (int bits = group / 2; bits > 0; bits /= 2) {
    sums.square += __shfl_xor_sync(WHOLE_WARP, sums.square, bits);
    sums.product += __shfl_xor_sync(WHOLE_WARP, sums.product, bits);
  }
  return sums;
}

struct BlockShared {
  RmsNormSums<float> sums[2][MAX_WARPS];
};

// `group` threads share a row: all of the block if WHOLE_BLOCK.
template <typename T, typename W, bool WHOLE_BLOCK>
__global__ void __launch_bounds__(Bounds<T, W, WHOLE_BLOCK>::THREADS, Bounds<T, W, WHOLE_BLOCK>::BLOCKS)
    rms_norm_jvp(const Arguments<T, W> given, int group) {
  SPARSECOD_SHARED(BlockShared, shared);
  constexpr int N = Pack<T>::COUNT;
  const int member = WHOLE_BLOCK ? threadIdx.x : threadIdx.x % group;
  const int rows_at_once = WHOLE_BLOCK ? 1 : blockDim.x / group;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * rows_at_once;
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once; first < given.rows; first += stride) {
    const int64_t row = WHOLE_BLOCK ? first : first + threadIdx.x / group;
    const int width = row < given.rows ? given.width : 0;  // threads without a row go on to the sums
    const int64_t at = row * given.width;
    Pack<T> x[PACKS], x_tangent[PACKS];
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      const int column = (member + i * group) * N;
      if (column < width) {
        x[i] = Pack<T>::load(given.x + at + column);
        x_tangent[i] = Pack<T>::load(given.x_tangent + at + column);
      }
    }
    RmsNormSums<float> sums;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      if ((member + i * group) * N < width) {
#pragma unroll
        for (int j = 0; j < N; ++j) sums.add({to_real(x[i].elements[j]), to_real(x_tangent[i].elements[j])});
      }
    }
    if constexpr (WHOLE_BLOCK) {
      sums = block_sum(sums, shared.sums[turn]);
      turn ^= 1;
    } else {
      sums = group_sum(sums, group);
    }
    const Dual<float> scale = rms_norm_scale<float>(sums, given.width, given.eps);
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      const int column = (member + i * group) * N;
      if (column < width) {
        const Pack<W, N> weight = Pack<W, N>::load(given.weight + column);
        Pack<T> y, y_tangent;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const Dual<float> normed = rms_norm<float>(
              {to_real(x[i].elements[j]), to_real(x_tangent[i].elements[j])}, scale, to_real(weight.elements[j]));
          y.elements[j] = from_real<T>(normed.value);
          y_tangent.elements[j] = from_real<T>(normed.tangent);
        }
        y.store(given.y + at + column);
        y_tangent.store(given.y_tangent + at + column);
      }
    }
  }
}

// Any row, element by element, a block for each.
constexpr int TWICE_THREADS = 512;

template <typename T, typename W>
__global__ void __launch_bounds__(TWICE_THREADS) rms_norm_jvp_twice(const Arguments<T, W> given, int64_t width) {
  SPARSECOD_SHARED(BlockShared, shared);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < given.rows; row += gridDim.x) {
    const int64_t at = row * width;
    RmsNormSums<float> sums;
    for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
      sums.add({to_real(given.x[at + column]), to_real(given.x_tangent[at + column])});
    }
    sums = block_sum(sums, shared.sums[turn]);
    turn ^= 1;
    const Dual<float> scale = rms_norm_scale<float>(sums, width, given.eps);
    for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
      const Dual<float> normed =
          rms_norm<float>({to_real(given.x[at + column]), to_real(given.x_tangent[at + column])}, scale,
                          to_real(given.weight[column]));
      given.y[at + column] = from_real<T>(normed.value);
      given.y_tangent[at + column] = from_real<T>(normed.tangent);
    }
  }
}

template <typename Kernel>
cudaError_t blocks_for(Kernel kernel, int threads, int64_t rows, int rows_at_once, unsigned& blocks) {
  int64_t resident;
  SPARSECOD_RETURN_IF_ERROR(resident_blocks(kernel, threads, 0, resident));
  const int64_t wanted = (rows + rows_at_once - 1) / rows_at_once;
  blocks = static_cast<unsigned>(wanted < resident ? wanted : resident);
  return cudaSuccess;
}

int64_t in_warps(int64_t threads) { return (threads + WARP - 1) / WARP * WARP; }

template <typename T, typename W, bool WHOLE_BLOCK>
cudaError_t launch_once(const Arguments<T, W>& given, int threads, int group, cudaStream_t stream) {
  const auto kernel = &rms_norm_jvp<T, W, WHOLE_BLOCK>;
  unsigned blocks;
  SPARSECOD_RETURN_IF_ERROR(blocks_for(kernel, threads, given.rows, threads / group, blocks));
  return SPARSECOD_LAUNCH(kernel, blocks, threads, 0, stream, given, group);
}

template <typename T, typename W>
cudaError_t launch(Arguments<T, W> given, int64_t width, cudaStream_t stream) {
  const int64_t packs = width / Pack<T>::COUNT;
  if (!in_packs<T>(width, given.x, given.x_tangent, given.weight, given.y, given.y_tangent) ||
      packs > PACKS * Bounds<T, W, true>::THREADS) {
    const auto kernel = &rms_norm_jvp_twice<T, W>;
    const int threads = static_cast<int>(width < TWICE_THREADS ? in_warps(width) : TWICE_THREADS);
    unsigned blocks;
    SPARSECOD_RETURN_IF_ERROR(blocks_for(kernel, threads, given.rows, 1, blocks));
    return SPARSECOD_LAUNCH(kernel, blocks, threads, 0, stream, given, width);
  }
  given.width = static_cast<int>(width);
  if (packs > PACKS * WARP) {
    const int threads = static_cast<int>(in_warps((packs + PACKS - 1) / PACKS));
    return launch_once<T, W, true>(given, threads, threads, stream);
  }
  int group = MIN_GROUP;
  while (group * PACKS < packs) group *= 2;
  return launch_once<T, W, false>(given, NARROW_THREADS, group, stream);
}

}  // namespace
}  // namespace sparsecod::cuda

cudaError_t sparsecod_rms_norm_jvp(const void* x, const void* x_tangent, const void* weight, void* y, void* y_tangent,
                                   sparsecod::cuda::Dtype dtype, sparsecod::cuda::Dtype weight_dtype, int64_t rows,
                                   int64_t width, int64_t probes, float eps, cudaStream_t stream) {
  using namespace sparsecod::cuda;
  return SPARSECOD_DISPATCH_DTYPE(dtype, T, [&] {
    const auto with_weight = [&](auto* typed_weight) {
      using W = std::remove_const_t<std::remove_pointer_t<decltype(typed_weight)>>;
      Arguments<T, W> given = {static_cast<const T*>(x), static_cast<const T*>(x_tangent), typed_weight,
                               static_cast<T*>(y), static_cast<T*>(y_tangent), rows, 0, eps};
      for (int64_t probe = 0; probe < probes; ++probe) {  // not yet fused: y is written as often as y'
        SPARSECOD_RETURN_IF_ERROR((launch<T, W>(given, width, stream)));
        given.x_tangent += rows * width;
        given.y_tangent += rows * width;
      }
      return cudaSuccess;
    };
    return weight_dtype == dtype ? with_weight(static_cast<const T*>(weight))
                                 : with_weight(static_cast<const float*>(weight));
  });
}
