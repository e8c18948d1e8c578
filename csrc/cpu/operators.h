// The operators on CPU. Their arguments have been checked.

#pragma once

#include <ATen/core/Tensor.h>

namespace sparsecod::cpu {

at::Tensor residual_add_moments(const at::Tensor& branch, const at::Tensor& residual,
                                const std::optional<at::Tensor>& bias, at::Tensor& moments);

// gate_up and gate_up_tangent [..., 2 F] -> output and output_tangent [..., F], all contiguous and not empty.
void swiglu_jvp(const at::Tensor& gate_up, const at::Tensor& gate_up_tangent, const at::Tensor& output,
                const at::Tensor& output_tangent);

// q [B, H, T, D], k and v [B, H_kv, S, D] and their tangents -> output and output_tangent like q, and log_sum_exp
// [B, H, T], contiguous, float64 for float64 and float32 else. None is empty; the last dimension is contiguous, but for
// that strides are arbitrary.
void flash_attention_jvp(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_tangent,
                         const at::Tensor& k_tangent, const at::Tensor& v_tangent, double scale, bool causal,
                         const at::Tensor& output, const at::Tensor& output_tangent, const at::Tensor& log_sum_exp);

}  // namespace sparsecod::cpu
