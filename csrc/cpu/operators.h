// The operators on CPU. Their arguments have been checked.

#pragma once

#include <ATen/core/Tensor.h>

namespace sparsecod::cpu {

at::Tensor residual_add_moments(const at::Tensor& branch, const at::Tensor& residual,
                                const std::optional<at::Tensor>& bias, at::Tensor& moments);

}  // namespace sparsecod::cpu
