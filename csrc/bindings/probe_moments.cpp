// sparsecod::probe_moments: schema, argument checks, registration.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "../common/probe_moments.h"
#include "../cpu/operators.h"
#include "checks.h"
#include "on_cuda.h"

#if defined(SPARSECOD_CUDA)
#include "../cuda/probe_moments.h"
#endif

namespace sparsecod {
namespace {

void check_accumulator(const char* argument, const at::Tensor& given, c10::SymInt rows, c10::SymInt columns,
                       const char* axes, const at::Tensor& u) {
  TORCH_CHECK_VALUE(given.dim() == 2 && given.sym_size(0) == rows && given.sym_size(1) == columns, argument,
                    " has shape ", given.sym_sizes(), ", but must have shape ", axes, " = [", rows, ", ", columns, "]");
  check_dtype(argument, given, at::kDouble);
  TORCH_CHECK_VALUE(given.is_contiguous(), argument, " has stride ", given.sym_strides(), ", but must be contiguous");
  TORCH_CHECK_VALUE(given.device() == u.device(), argument, " is on ", given.device(), ", but must be on u's device ",
                    u.device());
  TORCH_CHECK_VALUE(!given.requires_grad(), argument, " requires a gradient, but must not");
}

void check(const at::Tensor& v, const at::Tensor& u, const at::Tensor& sums, const at::Tensor& moments) {
  check_floating("u", u);
  TORCH_CHECK_VALUE(u.dim() == 3, "u has shape ", u.sym_sizes(), ", but must have shape [P, N, D]");
  const c10::SymInt probes = u.sym_size(0), width = u.sym_size(2);
  const bool per_token = v.sym_sizes() == u.sym_sizes();
  TORCH_CHECK_VALUE(per_token || (v.dim() == 2 && v.sym_size(0) == probes && v.sym_size(1) == width), "v has shape ",
                    v.sym_sizes(), ", but must have shape [P, D] = [", probes, ", ", width,
                    "], or [P, N, D] = ", u.sym_sizes());
  check_like("v", v, "u", u);
  check_accumulator("sums", sums, probes, width, "[P, D]", u);
  check_accumulator("moments", moments, probes, static_cast<int64_t>(ProbeMoment::COUNT), "[P, 3]", u);
}

void on_cpu(const at::Tensor& v, const at::Tensor& u, at::Tensor& sums, at::Tensor& moments) {
  check(v, u, sums, moments);
  if (u.numel() > 0) cpu::probe_moments(v.contiguous(), u.contiguous(), sums, moments);
}

void on_meta(const at::Tensor& v, const at::Tensor& u, at::Tensor& sums, at::Tensor& moments) {
  check(v, u, sums, moments);
}

#if defined(SPARSECOD_CUDA)
void on_cuda(const at::Tensor& v, const at::Tensor& u, at::Tensor& sums, at::Tensor& moments) {
  check(v, u, sums, moments);
  if (u.numel() == 0) return;
  const c10::cuda::CUDAGuard device(u.device());
  const at::Tensor probes = v.contiguous(), tokens = u.contiguous();
  int64_t doubles;
  C10_CUDA_CHECK(sparsecod_probe_moments_workspace(dtype_of(u), u.size(0), u.size(1), u.size(2), &doubles));
  const at::Tensor workspace = at::empty({doubles}, sums.options());
  C10_CUDA_CHECK(sparsecod_probe_moments(probes.const_data_ptr(), tokens.const_data_ptr(),
                                         sums.mutable_data_ptr<double>(), moments.mutable_data_ptr<double>(),
                                         workspace.mutable_data_ptr<double>(), dtype_of(u), v.dim() == 3, u.size(0),
                                         u.size(1), u.size(2), c10::cuda::getCurrentCUDAStream()));
}
#endif

using Signature = void(const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&);

void dispatch(const at::Tensor& v, const at::Tensor& u, at::Tensor& sums, at::Tensor& moments) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("sparsecod::probe_moments", "").typed<Signature>();
  op.call(v, u, sums, moments);
}

// What is measured carries no gradient, as under no_grad.
void without_gradient(const at::Tensor& v, const at::Tensor& u, at::Tensor& sums, at::Tensor& moments) {
  check(v, u, sums, moments);
  const at::AutoDispatchBelowAutograd below_autograd;
  dispatch(v, u, sums, moments);
}

// Tells autograd, as in-place operators do, that saved copies of the accumulators are out of date.
void with_new_version(const at::Tensor& v, const at::Tensor& u, at::Tensor& sums, at::Tensor& moments) {
  torch::autograd::increment_version(sums);
  torch::autograd::increment_version(moments);
  const at::AutoDispatchBelowADInplaceOrView below_versions;
  dispatch(v, u, sums, moments);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsecod, m) {
  m.def("probe_moments(Tensor v, Tensor u, Tensor(a!) sums, Tensor(b!) moments) -> ()",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparsecod, CPU, m) { m.impl("probe_moments", on_cpu); }
#if defined(SPARSECOD_CUDA)
TORCH_LIBRARY_IMPL(sparsecod, CUDA, m) { m.impl("probe_moments", on_cuda); }
#endif
TORCH_LIBRARY_IMPL(sparsecod, Meta, m) { m.impl("probe_moments", on_meta); }
TORCH_LIBRARY_IMPL(sparsecod, Autograd, m) { m.impl("probe_moments", without_gradient); }
TORCH_LIBRARY_IMPL(sparsecod, ADInplaceOrView, m) { m.impl("probe_moments", with_new_version); }

}  // namespace sparsecod
