// sparsecod::residual_add_moments: schema, argument checks, shape inference, gradient, registration.

#include "residual_add_moments.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numeric>
#include <string>
#include <vector>

#include "../common/columns.h"
#include "../common/moments.h"
#include "../cpu/operators.h"
#include "checks.h"
#include "on_cuda.h"

#if defined(SPARSECOD_CUDA)
#include "../cuda/residual_add_moments.h"
#endif

namespace sparsecod {

namespace {

// A buffer that the operator adds to.
void check_sums(const char* argument, const at::Tensor& given, c10::SymIntArrayRef shape, const at::Tensor& branch) {
  check_shape(argument, given, shape, "shape ");
  check_dtype(argument, given, at::kDouble);
  TORCH_CHECK_VALUE(given.is_contiguous(), argument, " has stride ", given.sym_strides(), ", but must be contiguous");
  TORCH_CHECK_VALUE(given.device() == branch.device(), argument, " is on ", given.device(),
                    ", but must be on branch's device ", branch.device());
  TORCH_CHECK_VALUE(!given.requires_grad(), argument, " requires a gradient, but must not");
}

}  // namespace

void check_residual_add_moments(const at::Tensor& branch, const at::Tensor& residual, const OptionalTensor& bias,
                                const at::Tensor& moments, const OptionalTensor& columns) {
  check_floating("branch", branch);
  TORCH_CHECK_VALUE(branch.dim() > 0, "branch has shape [], but must have shape [..., D]");
  const c10::SymInt width = branch.sym_size(-1);
  check_same_shape("residual", residual, "branch", branch);
  check_like("residual", residual, "branch", branch);
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == width, "bias has shape ", bias->sym_sizes(),
                      ", but must have shape [", width, "], branch's last dimension");
    check_like("bias", *bias, "branch", branch);
  }
  check_sums("moments", moments, {c10::SymInt(NUM_MOMENTS)}, branch);
  if (columns) check_sums("columns", *columns, {c10::SymInt(NUM_COLUMN_SUMS), width}, branch);
}

namespace {

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, at::Tensor&,
                             const OptionalTensor&);

at::Tensor dispatch(const at::Tensor& branch, const at::Tensor& residual, const OptionalTensor& bias,
                    at::Tensor& moments, const OptionalTensor& columns) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("sparsecod::residual_add_moments", "").typed<Signature>();
  return op.call(branch, residual, bias, moments, columns);
}

at::Tensor on_cpu(const at::Tensor& branch, const at::Tensor& residual, const OptionalTensor& bias,
                  at::Tensor& moments, const OptionalTensor& columns) {
  check_residual_add_moments(branch, residual, bias, moments, columns);
  if (columns && branch.numel() > 0) cpu::add_column_powers(branch, residual, bias, *columns);
  return cpu::residual_add_moments(branch, residual, bias, moments);
}

#if defined(SPARSECOD_CUDA)
at::Tensor on_cuda(const at::Tensor& branch, const at::Tensor& residual, const OptionalTensor& bias,
                   at::Tensor& moments, const OptionalTensor& columns) {
  check_residual_add_moments(branch, residual, bias, moments, columns);
  const c10::cuda::CUDAGuard device(branch.device());
  at::Tensor output = at::empty(branch.sizes(), branch.options());
  if (output.numel() == 0) return output;
  const at::Tensor branch_rows = branch.contiguous(), residual_rows = residual.contiguous();
  const at::Tensor bias_row = bias ? bias->contiguous() : at::Tensor();
  const int64_t width = branch.size(-1), rows = branch.numel() / width;
  int64_t scratch_bytes;
  C10_CUDA_CHECK(sparsecod_residual_add_moments_scratch(dtype_of(branch), rows, width, columns.has_value(),
                                                        &scratch_bytes));
  const at::Tensor scratch = at::empty({scratch_bytes}, branch.options().dtype(at::kByte));
  C10_CUDA_CHECK(sparsecod_residual_add_moments(
      branch_rows.const_data_ptr(), residual_rows.const_data_ptr(), bias ? bias_row.const_data_ptr() : nullptr,
      output.mutable_data_ptr(), moments.mutable_data_ptr<double>(),
      columns ? columns->mutable_data_ptr<double>() : nullptr, scratch.mutable_data_ptr(), dtype_of(branch), rows,
      width, c10::cuda::getCurrentCUDAStream()));
  return output;
}
#endif

at::Tensor on_meta(const at::Tensor& branch, const at::Tensor& residual, const OptionalTensor& bias,
                   at::Tensor& moments, const OptionalTensor& columns) {
  check_residual_add_moments(branch, residual, bias, moments, columns);
  return at::empty_like(branch, at::MemoryFormat::Contiguous);
}

// The sum is linear: its gradient goes to branch and residual as it is, and to the bias summed over rows.
class ResidualAdd : public torch::autograd::Function<ResidualAdd> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& branch,
                            const at::Tensor& residual, const OptionalTensor& bias, at::Tensor& moments,
                            const OptionalTensor& columns) {
    const at::AutoDispatchBelowAutograd below_autograd;
    context->set_materialize_grads(false);
    return dispatch(branch, residual, bias, moments, columns);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list output_grads) {
    const at::Tensor& grad = output_grads[0];
    at::Tensor bias_grad;
    // Third among the tensors given is the bias, or without one the moments, which never need a gradient.
    if (grad.defined() && context->needs_input_grad(2)) {
      std::vector<int64_t> row_dims(grad.dim() - 1);
      std::iota(row_dims.begin(), row_dims.end(), 0);
      bias_grad = row_dims.empty() ? grad : at::sum(grad, row_dims);
    }
    return {grad, grad, bias_grad, at::Tensor(), at::Tensor()};
  }
};

at::Tensor with_gradient(const at::Tensor& branch, const at::Tensor& residual, const OptionalTensor& bias,
                         at::Tensor& moments, const OptionalTensor& columns) {
  if (torch::autograd::compute_requires_grad(branch, residual, bias)) {
    return ResidualAdd::apply(branch, residual, bias, moments, columns);
  }
  const at::AutoDispatchBelowAutograd below_autograd;
  return dispatch(branch, residual, bias, moments, columns);
}

// Tells autograd, as in-place operators do, that saved copies of the sums are out of date.
at::Tensor with_new_version(const at::Tensor& branch, const at::Tensor& residual, const OptionalTensor& bias,
                            at::Tensor& moments, const OptionalTensor& columns) {
  torch::autograd::increment_version(moments);
  if (columns) torch::autograd::increment_version(*columns);
  const at::AutoDispatchBelowADInplaceOrView below_versions;
  return dispatch(branch, residual, bias, moments, columns);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsecod, m) {
  m.def(
      "residual_add_moments(Tensor branch, Tensor residual, Tensor? bias, Tensor(a!) moments, Tensor(b!)? columns) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparsecod, CPU, m) { m.impl("residual_add_moments", on_cpu); }
#if defined(SPARSECOD_CUDA)
TORCH_LIBRARY_IMPL(sparsecod, CUDA, m) { m.impl("residual_add_moments", on_cuda); }
#endif
TORCH_LIBRARY_IMPL(sparsecod, Meta, m) { m.impl("residual_add_moments", on_meta); }
TORCH_LIBRARY_IMPL(sparsecod, Autograd, m) { m.impl("residual_add_moments", with_gradient); }
TORCH_LIBRARY_IMPL(sparsecod, ADInplaceOrView, m) { m.impl("residual_add_moments", with_new_version); }

}  // namespace sparsecod
