// y = silu(gate) * up and its tangent, row by row.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <type_traits>

#include "../common/dual.h"
#include "operators.h"

namespace sparsecod::cpu {
namespace {

constexpr int64_t ELEMENTS_PER_THREAD = 8192;  // fewer are not worth waking one

template <typename T>
void swiglu_row(const T* gate, const T* gate_tangent, T* output, T* output_tangent, int64_t width) {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T *up = gate + width, *up_tangent = gate_tangent + width;
  for (int64_t i = 0; i < width; ++i) {
    const Dual<Real> a = {static_cast<Real>(gate[i]), static_cast<Real>(gate_tangent[i])};
    const Dual<Real> b = {static_cast<Real>(up[i]), static_cast<Real>(up_tangent[i])};
    const Dual<Real> product = silu(a, 1 / (1 + std::exp(-a.value))) * b;
    output[i] = static_cast<T>(product.value);
    output_tangent[i] = static_cast<T>(product.tangent);
  }
}

}  // namespace

void swiglu_jvp(const at::Tensor& gate_up, const at::Tensor& gate_up_tangent, const at::Tensor& output,
                const at::Tensor& output_tangent) {
  const int64_t width = output.size(-1), rows = output.numel() / width;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "swiglu_jvp", [&] {
    const scalar_t* gate = gate_up.const_data_ptr<scalar_t>();
    const scalar_t* gate_tangent = gate_up_tangent.const_data_ptr<scalar_t>();
    scalar_t *y = output.mutable_data_ptr<scalar_t>(), *y_tangent = output_tangent.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, at::divup(ELEMENTS_PER_THREAD, width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        swiglu_row(gate + 2 * row * width, gate_tangent + 2 * row * width, y + row * width, y_tangent + row * width,
                   width);
      }
    });
  });
}

}  // namespace sparsecod::cpu
