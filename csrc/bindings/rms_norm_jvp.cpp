// sparsecod::rms_norm_jvp: schema, argument checks, shape inference, registration.

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <tuple>

#include "../cpu/operators.h"
#include "checks.h"
#include "on_cuda.h"

#if defined(SPARSECOD_CUDA)
#include "../cuda/rms_norm_jvp.h"
#endif

namespace sparsecod {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor>;

// Returns y and y_tangent, not yet written.
Result prepare(const at::Tensor& x, const at::Tensor& x_tangent, const at::Tensor& weight, double eps) {
  check_floating("x", x);
  TORCH_CHECK_VALUE(x.dim() > 0, "x has shape [], but must have shape [..., D]");
  check_tangent("x_tangent", x_tangent, "x", x);
  const c10::SymInt width = x.sym_size(-1);
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.sym_size(0) == width, "weight has shape ", weight.sym_sizes(),
                    ", but must have shape [", width, "], x's last dimension");
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kFloat || weight.scalar_type() == x.scalar_type(), "weight is ",
                    name(weight.scalar_type()), ", but must be float32 or have x's dtype ", name(x.scalar_type()));
  TORCH_CHECK_VALUE(weight.device() == x.device(), "weight is on ", weight.device(), ", but must be on x's device ",
                    x.device());
  TORCH_CHECK_VALUE(eps >= 0, "eps is ", eps, ", but must be at least 0");
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint(x_tangent.sym_sizes(), x.options())};
}

Result on_cpu(const at::Tensor& x, const at::Tensor& x_tangent, const at::Tensor& weight, double eps) {
  const auto [y, y_tangent] = prepare(x, x_tangent, weight, eps);
  if (y.numel() > 0) {
    cpu::rms_norm_jvp(x.contiguous(), x_tangent.contiguous(), weight.contiguous(), eps, y, y_tangent);
  }
  return {y, y_tangent};
}

#if defined(SPARSECOD_CUDA)
Result on_cuda(const at::Tensor& x, const at::Tensor& x_tangent, const at::Tensor& weight, double eps) {
  const auto [y, y_tangent] = prepare(x, x_tangent, weight, eps);
  const c10::cuda::CUDAGuard device(y.device());
  if (y.numel() > 0) {
    const at::Tensor rows = x.contiguous(), tangent_rows = x_tangent.contiguous(), weight_row = weight.contiguous();
    const int64_t width = weight.numel();
    C10_CUDA_CHECK(sparsecod_rms_norm_jvp(rows.const_data_ptr(), tangent_rows.const_data_ptr(),
                                          weight_row.const_data_ptr(), y.mutable_data_ptr(),
                                          y_tangent.mutable_data_ptr(), dtype_of(y), dtype_of(weight),
                                          y.numel() / width, width, y_tangent.numel() / y.numel(),
                                          static_cast<float>(eps), c10::cuda::getCurrentCUDAStream()));
  }
  return {y, y_tangent};
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsecod, m) {
  m.def("rms_norm_jvp(Tensor x, Tensor x_tangent, Tensor weight, float eps) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparsecod, CPU, m) { m.impl("rms_norm_jvp", on_cpu); }
#if defined(SPARSECOD_CUDA)
TORCH_LIBRARY_IMPL(sparsecod, CUDA, m) { m.impl("rms_norm_jvp", on_cuda); }
#endif
TORCH_LIBRARY_IMPL(sparsecod, Meta, m) { m.impl("rms_norm_jvp", prepare); }
TORCH_LIBRARY_IMPL(sparsecod, Autograd, m) {
  m.impl("rms_norm_jvp", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sparsecod
