// The operators on CPU. Their arguments have been checked.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <optional>

namespace sparsecod::cpu {

at::Tensor residual_add_moments(const at::Tensor& branch, const at::Tensor& residual,
                                const std::optional<at::Tensor>& bias, at::Tensor& moments);

// gate_up and gate_up_tangent [..., 2 F] -> output and output_tangent [..., F], all contiguous and not empty.
void swiglu_jvp(const at::Tensor& gate_up, const at::Tensor& gate_up_tangent, const at::Tensor& output,
                const at::Tensor& output_tangent);

// Adds to counts [tensors, thresholds], int64, how many elements of each tensor, which is dense, are below a threshold.
void count_below(at::TensorList tensors, at::ArrayRef<double> thresholds, const at::Tensor& counts);

}  // namespace sparsecod::cpu
