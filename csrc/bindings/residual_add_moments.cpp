// sparsecod::residual_add_moments: schema, argument checks, shape inference, gradient, CPU registration.

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

#include "../common/moments.h"
#include "../cpu/operators.h"
#include "checks.h"

namespace sparsecod {

void check_residual_add_moments(const at::Tensor& branch, const at::Tensor& residual,
                                const std::optional<at::Tensor>& bias, const at::Tensor& moments) {
  check_floating("branch", branch);
  TORCH_CHECK_VALUE(branch.dim() > 0, "branch has shape [], but must have shape [..., D]");
  check_same_shape("residual", residual, "branch", branch);
  check_like("residual", residual, "branch", branch);
  if (bias) {
    const c10::SymInt width = branch.sym_size(-1);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == width, "bias has shape ", bias->sym_sizes(),
                      ", but must have shape [", width, "], branch's last dimension");
    check_like("bias", *bias, "branch", branch);
  }
  TORCH_CHECK_VALUE(moments.dim() == 1 && moments.sym_size(0) == NUM_MOMENTS, "moments has shape ", moments.sym_sizes(),
                    ", but must have shape [", static_cast<int>(NUM_MOMENTS), "]");
  TORCH_CHECK_VALUE(moments.scalar_type() == at::kDouble, "moments is ", name(moments.scalar_type()),
                    ", but must be float64");
  TORCH_CHECK_VALUE(moments.is_contiguous(), "moments has stride ", moments.sym_strides(), ", but must be contiguous");
  TORCH_CHECK_VALUE(moments.device() == branch.device(), "moments is on ", moments.device(),
                    ", but must be on branch's device ", branch.device());
  TORCH_CHECK_VALUE(!moments.requires_grad(), "moments requires a gradient, but must not");
}

namespace {

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, at::Tensor&);

at::Tensor dispatch(const at::Tensor& branch, const at::Tensor& residual, const std::optional<at::Tensor>& bias,
                    at::Tensor& moments) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("sparsecod::residual_add_moments", "").typed<Signature>();
  return op.call(branch, residual, bias, moments);
}

at::Tensor on_cpu(const at::Tensor& branch, const at::Tensor& residual, const std::optional<at::Tensor>& bias,
                  at::Tensor& moments) {
  check_residual_add_moments(branch, residual, bias, moments);
  return cpu::residual_add_moments(branch, residual, bias, moments);
}

at::Tensor on_meta(const at::Tensor& branch, const at::Tensor& residual, const std::optional<at::Tensor>& bias,
                   at::Tensor& moments) {
  check_residual_add_moments(branch, residual, bias, moments);
  return at::empty_like(branch, at::MemoryFormat::Contiguous);
}

// The sum is linear: its gradient goes to branch and residual as it is, and to the bias summed over rows.
class ResidualAdd : public torch::autograd::Function<ResidualAdd> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& branch,
                            const at::Tensor& residual, const std::optional<at::Tensor>& bias, at::Tensor& moments) {
    const at::AutoDispatchBelowAutograd below_autograd;
    context->set_materialize_grads(false);
    return dispatch(branch, residual, bias, moments);
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
    return {grad, grad, bias_grad, at::Tensor()};
  }
};

at::Tensor with_gradient(const at::Tensor& branch, const at::Tensor& residual, const std::optional<at::Tensor>& bias,
                         at::Tensor& moments) {
  if (torch::autograd::compute_requires_grad(branch, residual, bias)) {
    return ResidualAdd::apply(branch, residual, bias, moments);
  }
  const at::AutoDispatchBelowAutograd below_autograd;
  return dispatch(branch, residual, bias, moments);
}

// Tells autograd, as in-place operators do, that saved copies of the moments are out of date.
at::Tensor with_new_version(const at::Tensor& branch, const at::Tensor& residual, const std::optional<at::Tensor>& bias,
                            at::Tensor& moments) {
  torch::autograd::increment_version(moments);
  const at::AutoDispatchBelowADInplaceOrView below_versions;
  return dispatch(branch, residual, bias, moments);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsecod, m) {
  m.def("residual_add_moments(Tensor branch, Tensor residual, Tensor? bias, Tensor(a!) moments) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparsecod, CPU, m) { m.impl("residual_add_moments", on_cpu); }
TORCH_LIBRARY_IMPL(sparsecod, Meta, m) { m.impl("residual_add_moments", on_meta); }
TORCH_LIBRARY_IMPL(sparsecod, Autograd, m) { m.impl("residual_add_moments", with_gradient); }
TORCH_LIBRARY_IMPL(sparsecod, ADInplaceOrView, m) { m.impl("residual_add_moments", with_new_version); }

}  // namespace sparsecod
