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

// q [B, H, T, D], k [B, H_kv, S, D], of any strides but for D, lse [B, H, T] contiguous; none empty. Adds to entropy
// [B, H], float64, and counts [B, H, thresholds], int64.
void attention_stats(const at::Tensor& q, const at::Tensor& k, const at::Tensor& lse, double scale,
                     at::ArrayRef<double> thresholds, bool causal, const at::Tensor& entropy,
                     const at::Tensor& counts);

}  // namespace sparsecod::cpu
