#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace sparsecod {

// Raises ValueError with the argument's name, what was given and what is accepted.
using OptionalTensor = std::optional<at::Tensor>;

void check_residual_add_moments(const at::Tensor& branch, const at::Tensor& residual, const OptionalTensor& bias,
                                const at::Tensor& moments, const OptionalTensor& columns);

}  // namespace sparsecod
