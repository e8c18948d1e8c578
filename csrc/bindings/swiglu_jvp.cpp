// sparsecod::swiglu_jvp: schema, argument checks, shape inference, registration.

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <tuple>

#include "../cpu/operators.h"
#include "checks.h"
#include "on_cuda.h"

#if defined(SPARSECOD_CUDA)
#include "../cuda/swiglu_jvp.h"
#endif

namespace sparsecod {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor>;

// Returns output and output tangent, not yet written.
Result prepare(const at::Tensor& gate_up, const at::Tensor& gate_up_tangent) {
  check_floating("gate_up", gate_up);
  TORCH_CHECK_VALUE(gate_up.dim() > 0 && gate_up.sym_size(-1) % 2 == 0, "gate_up has shape ", gate_up.sym_sizes(),
                    ", but must have shape [..., 2 F]");
  const auto probes = check_tangent("gate_up_tangent", gate_up_tangent, "gate_up", gate_up);
  c10::SymDimVector shape(gate_up.sym_sizes());
  shape.back() = shape.back() / 2;
  return {at::empty_symint(shape, gate_up.options()),
          at::empty_symint(with_probes(probes, shape), gate_up.options())};
}

Result on_cpu(const at::Tensor& gate_up, const at::Tensor& gate_up_tangent) {
  const auto [output, output_tangent] = prepare(gate_up, gate_up_tangent);
  if (output.numel() > 0) {
    cpu::swiglu_jvp(gate_up.contiguous(), gate_up_tangent.contiguous(), output, output_tangent);
  }
  return {output, output_tangent};
}

#if defined(SPARSECOD_CUDA)
Result on_cuda(const at::Tensor& gate_up, const at::Tensor& gate_up_tangent) {
  const auto [output, output_tangent] = prepare(gate_up, gate_up_tangent);
  const c10::cuda::CUDAGuard device(output.device());
  if (output.numel() > 0) {
    const at::Tensor input = gate_up.contiguous(), input_tangent = gate_up_tangent.contiguous();
    const int64_t width = output.size(-1);
    C10_CUDA_CHECK(sparsecod_swiglu_jvp(input.const_data_ptr(), input_tangent.const_data_ptr(),
                                        output.mutable_data_ptr(), output_tangent.mutable_data_ptr(), dtype_of(output),
                                        output.numel() / width, width,
                                        output_tangent.numel() / output.numel(), c10::cuda::getCurrentCUDAStream()));
  }
  return {output, output_tangent};
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsecod, m) {
  m.def("swiglu_jvp(Tensor gate_up, Tensor gate_up_tangent) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparsecod, CPU, m) { m.impl("swiglu_jvp", on_cpu); }
#if defined(SPARSECOD_CUDA)
TORCH_LIBRARY_IMPL(sparsecod, CUDA, m) { m.impl("swiglu_jvp", on_cuda); }
#endif
TORCH_LIBRARY_IMPL(sparsecod, Meta, m) { m.impl("swiglu_jvp", prepare); }
TORCH_LIBRARY_IMPL(sparsecod, Autograd, m) {
  m.impl("swiglu_jvp", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sparsecod
