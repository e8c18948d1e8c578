// sparsecod::count_below: schema, argument checks, shape inference, registration.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "../cpu/operators.h"
#include "checks.h"
#include "on_cuda.h"

#if defined(SPARSECOD_CUDA)
#include "../cuda/count_below.h"
#endif

namespace sparsecod {
namespace {

void check(at::TensorList tensors, at::ArrayRef<double> thresholds) {
  TORCH_CHECK_VALUE(!tensors.empty(), "tensors is empty, but must hold at least one tensor");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string argument = "tensors[" + std::to_string(i) + "]";
    check_floating(argument.c_str(), tensors[i]);
    TORCH_CHECK_VALUE(tensors[i].device() == tensors[0].device(), argument, " is on ", tensors[i].device(),
                      ", but must be on tensors[0]'s device ", tensors[0].device());
  }
  check_thresholds(thresholds, 1);
}

// Elements are counted in the order in which they lie in memory: a copy is made of overlapping ones and of gaps only.
std::vector<at::Tensor> dense(at::TensorList tensors) {
  std::vector<at::Tensor> all;
  all.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    all.push_back(tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous());
  }
  return all;
}

std::vector<int64_t> shape(at::TensorList tensors, at::ArrayRef<double> thresholds) {
  return {static_cast<int64_t>(tensors.size()), static_cast<int64_t>(thresholds.size())};
}

at::Tensor on_cpu(at::TensorList tensors, at::ArrayRef<double> thresholds) {
  check(tensors, thresholds);
  const at::Tensor counts = at::zeros(shape(tensors, thresholds), at::kLong);
  cpu::count_below(dense(tensors), thresholds, counts);
  return counts;
}

#if defined(SPARSECOD_CUDA)
at::Tensor on_cuda(at::TensorList tensors, at::ArrayRef<double> thresholds) {
  check(tensors, thresholds);
  const c10::cuda::CUDAGuard device(tensors[0].device());
  const at::Tensor counts = at::zeros(shape(tensors, thresholds), tensors[0].options().dtype(at::kLong));
  const std::vector<at::Tensor> all = dense(tensors);
  std::vector<const void*> pointers;
  std::vector<int64_t> sizes;
  std::vector<cuda::Dtype> dtypes;
  for (const at::Tensor& tensor : all) {
    pointers.push_back(tensor.const_data_ptr());
    sizes.push_back(tensor.numel());
    dtypes.push_back(dtype_of(tensor));
  }
  C10_CUDA_CHECK(sparsecod_count_below(pointers.data(), sizes.data(), dtypes.data(), sizes.size(), thresholds.data(),
                                       thresholds.size(), counts.mutable_data_ptr<int64_t>(),
                                       c10::cuda::getCurrentCUDAStream()));
  return counts;
}
#endif

at::Tensor on_meta(at::TensorList tensors, at::ArrayRef<double> thresholds) {
  check(tensors, thresholds);
  return at::empty(shape(tensors, thresholds), tensors[0].options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsecod, m) {
  m.def("count_below(Tensor[] tensors, float[] thresholds) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparsecod, CPU, m) { m.impl("count_below", on_cpu); }
#if defined(SPARSECOD_CUDA)
TORCH_LIBRARY_IMPL(sparsecod, CUDA, m) { m.impl("count_below", on_cuda); }
#endif
TORCH_LIBRARY_IMPL(sparsecod, Meta, m) { m.impl("count_below", on_meta); }
TORCH_LIBRARY_IMPL(sparsecod, Autograd, m) {
  m.impl("count_below", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sparsecod
