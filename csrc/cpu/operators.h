// The operators on CPU. Their arguments have been checked.

#pragma once

#include <ATen/core/Tensor.h>

namespace sparsecod::cpu {

at::Tensor residual_add_moments(const at::Tensor& branch, const at::Tensor& residual,
                                const std::optional<at::Tensor>& bias, at::Tensor& moments);

// Adds the power sums of the columns of y (csrc/common/columns.h) to `columns`. The input is not empty.
void add_column_powers(const at::Tensor& branch, const at::Tensor& residual, const std::optional<at::Tensor>& bias,
                       const at::Tensor& columns);

// gate_up and gate_up_tangent [..., 2 F] -> output and output_tangent [..., F], all contiguous and not empty.
void swiglu_jvp(const at::Tensor& gate_up, const at::Tensor& gate_up_tangent, const at::Tensor& output,
                const at::Tensor& output_tangent);

}  // namespace sparsecod::cpu
