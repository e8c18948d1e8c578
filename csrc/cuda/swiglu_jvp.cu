// y = silu(gate) * up and its tangents. Each thread takes 16 bytes of neighbours of a row at a time.

#include "swiglu_jvp.h"

#include <cmath>

#include "../common/dual.h"
#include "element.h"

namespace sparsecod::cuda {
namespace {

constexpr int THREADS = 256;

// `packs` is below MAX_PACKS: dividing by 64 bits would cost more than all the rest.
constexpr int64_t MAX_PACKS = int64_t{1} << 31;  // so that adding a stride stays within 32 bits

template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    swiglu_jvp(const T* __restrict__ gate_up, const T* __restrict__ gate_up_tangent, T* __restrict__ output,
               T* __restrict__ output_tangent, uint32_t packs, int64_t width, int probes, int64_t probe_stride) {
  using Neighbours = Pack<T, N>;
  const uint32_t packs_per_row = width / N, stride = gridDim.x * THREADS;
  for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < packs; i += stride) {
    const int64_t at = static_cast<int64_t>(i) * N, row = i / packs_per_row;
    const int64_t gate_at = at + row * width, up_at = gate_at + width;
    const Neighbours gate = Neighbours::load(gate_up + gate_at), up = Neighbours::load(gate_up + up_at);
    Neighbours y;
#pragma unroll 1  // as few registers as one tangent needs
    for (int probe = 0; probe < probes; ++probe) {
      const T* const tangent = gate_up_tangent + 2 * probe * probe_stride;
      const Neighbours gate_tangent = Neighbours::load(tangent + gate_at);
      const Neighbours up_tangent = Neighbours::load(tangent + up_at);
      Neighbours y_tangent;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Dual<float> a = {to_real(gate.elements[j]), to_real(gate_tangent.elements[j])};
        const Dual<float> b = {to_real(up.elements[j]), to_real(up_tangent.elements[j])};
        const Dual<float> product = silu(a, 1 / (1 + std::exp(-a.value))) * b;
        y.elements[j] = from_real<T>(product.value);
        y_tangent.elements[j] = from_real<T>(product.tangent);
      }
      y_tangent.store(output_tangent + probe * probe_stride + at);
    }
    y.store(output + at);
  }
}

template <typename T, int N>
cudaError_t launch(const T* gate_up, const T* gate_up_tangent, T* output, T* output_tangent, int64_t rows,
                   int64_t width, int64_t probes, cudaStream_t stream) {
  const auto kernel = &swiglu_jvp<T, N>;
  int64_t resident;
  SPARSECOD_RETURN_IF_ERROR(resident_blocks(kernel, THREADS, 0, resident));
  const int64_t max_rows = MAX_PACKS * N / width;
  for (int64_t row = 0; row < rows; row += max_rows) {
    const int64_t packs = (rows - row < max_rows ? rows - row : max_rows) * width / N;
    const int64_t blocks = (packs + THREADS - 1) / THREADS;
    SPARSECOD_RETURN_IF_ERROR(SPARSECOD_LAUNCH(
        kernel, static_cast<unsigned>(blocks < resident ? blocks : resident), THREADS, 0, stream,
        gate_up + 2 * row * width, gate_up_tangent + 2 * row * width, output + row * width,
        output_tangent + row * width, static_cast<uint32_t>(packs), width, static_cast<int>(probes),
        rows * width));
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace sparsecod::cuda

cudaError_t sparsecod_swiglu_jvp(const void* gate_up, const void* gate_up_tangent, void* output, void* output_tangent,
                                 sparsecod::cuda::Dtype dtype, int64_t rows, int64_t width, int64_t probes,
                                 cudaStream_t stream) {
  using namespace sparsecod::cuda;
  return SPARSECOD_DISPATCH_DTYPE(dtype, T, [&] {
    const bool packed = in_packs<T>(width, gate_up, gate_up_tangent, output, output_tangent);
    const auto launch_packs = packed ? &launch<T, Pack<T>::COUNT> : &launch<T, 1>;
    return launch_packs(static_cast<const T*>(gate_up), static_cast<const T*>(gate_up_tangent),
                        static_cast<T*>(output), static_cast<T*>(output_tangent), rows, width, probes, stream);
  });
}
