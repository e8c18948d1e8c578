// The operators on CPU. Their arguments have been checked.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <optional>

namespace sparsecod::cpu {

at::Tensor residual_add_moments(const at::Tensor& branch, const at::Tensor& residual,
                                const std::optional<at::Tensor>& bias, at::Tensor& moments);

// Adds the power sums of the columns of y (csrc/common/columns.h) to `columns`. The input is not empty.
void add_column_powers(const at::Tensor& branch, const at::Tensor& residual, const std::optional<at::Tensor>& bias,
                       const at::Tensor& columns);

// gate_up [..., 2 F] and gate_up_tangent, as large or a multiple (probes) -> output [..., F] and output_tangent, all
// contiguous and not empty.
void swiglu_jvp(const at::Tensor& gate_up, const at::Tensor& gate_up_tangent, const at::Tensor& output,
                const at::Tensor& output_tangent);

// x and y [..., D], x_tangent and y_tangent as large or a multiple (probes), weight [D] of x's dtype or float32, all
// contiguous and not empty.
void rms_norm_jvp(const at::Tensor& x, const at::Tensor& x_tangent, const at::Tensor& weight, double eps,
                  const at::Tensor& y, const at::Tensor& y_tangent);

// v [P, D] or [P, N, D] and u [P, N, D], contiguous and not empty; adds to sums [P, D] and moments [P, 3].
void probe_moments(const at::Tensor& v, const at::Tensor& u, const at::Tensor& sums, const at::Tensor& moments);

// Adds to counts [tensors, thresholds], int64, how many elements of each tensor, which is dense, are below a threshold.
void count_below(at::TensorList tensors, at::ArrayRef<double> thresholds, const at::Tensor& counts);

// q [B, H, T, D], k [B, H_kv, S, D], of any strides but for D, lse [B, H, T] contiguous; none empty. Adds to entropy
// [B, H], float64, and counts [B, H, thresholds], int64.
void attention_stats(const at::Tensor& q, const at::Tensor& k, const at::Tensor& lse, double scale,
                     at::ArrayRef<double> thresholds, bool causal, const at::Tensor& entropy,
                     const at::Tensor& counts);

// Tangents of N probes of q, k and v: scale offset + rate x for x each of them.
struct SharedTangents {
  at::Tensor q_offset, k_offset, v_offset;  // [N, 1, H, S, D], [N, 1, H_kv, S, D], [N, 1, H_kv, 1, D]
  at::Tensor scale, rate;                   // [B, S], [N, B, S], contiguous, of log_sum_exp's dtype
};

// q [B, H, T, D], k and v [B, H_kv, S, D] and their tangents, with probes [P, ...] in front -> output like q,
// output_tangent, of `shared` before those P, and log_sum_exp [B, H, T], contiguous, float64 for float64 and float32
// else. None is empty but tangents that `shared` makes needless; the last dimension is contiguous, but for that strides
// are arbitrary. S = T if there are `shared` tangents.
void flash_attention_jvp(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_tangent,
                         const at::Tensor& k_tangent, const at::Tensor& v_tangent,
                         const std::optional<SharedTangents>& shared, double scale, bool causal,
                         const at::Tensor& output, const at::Tensor& output_tangent, const at::Tensor& log_sum_exp);

}  // namespace sparsecod::cpu
