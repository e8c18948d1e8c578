// What flash_attention_jvp.cpp computes on: tensors by their strides, and one thread's memory.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include "lanes.h"
#include "operators.h"

namespace sparsecod::cpu::flash_attention {

constexpr int64_t QUERIES = 64, KEYS = 48;  // of a block and of a tile, whose scores stay in the first cache

// A tensor [batch, head, row, column], perhaps with probes in front, contiguous in the last dimension. Strides are in
// elements.
template <typename T>
struct Rows {
  T* data;
  int64_t probe_stride, batch_stride, head_stride, row_stride;

  explicit Rows(const at::Tensor& tensor)
      : data(static_cast<T*>(tensor.data_ptr())),
        probe_stride(tensor.dim() == 5 ? tensor.stride(0) : 0),
        batch_stride(tensor.stride(-4)),
        head_stride(tensor.stride(-3)),
        row_stride(tensor.stride(-2)) {}

  SPARSECOD_INLINE T* row(int64_t batch, int64_t head, int64_t row, int64_t probe = 0) const {
    return data + probe * probe_stride + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

// Tangents scale * offset + rate * x of x = q, k and v, by token; offsets of v are those of its first key for all keys.
template <typename T, typename Real>
struct SharedRows {
  int64_t probes;  // the first of all; none of the rest is set if 0
  Rows<T> q_offset, k_offset, v_offset;
  const Real *scale, *rate;  // [B, S], [probes, B, S]

  SharedRows(const std::optional<SharedTangents>& given, const at::Tensor& q)
      : probes(given ? given->rate.size(0) : 0),
        q_offset(given ? given->q_offset : q),
        k_offset(given ? given->k_offset : q),
        v_offset(given ? given->v_offset : q),
        scale(given ? given->scale.const_data_ptr<Real>() : nullptr),
        rate(given ? given->rate.const_data_ptr<Real>() : nullptr) {}
};

template <typename T>
struct Problem {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Rows<T> q, k, v, q_tangent, k_tangent, v_tangent, output, output_tangent;
  SharedRows<T, Real> shared;
  Real* log_sum_exp;
  int64_t probes, batch, heads, group, queries, keys, head_dim;  // group: heads that share keys and values
  Real scale;
  bool causal;

  // How many queries from `first_query` on do not see a key.
  SPARSECOD_INLINE int64_t blind(int64_t key, int64_t first_query) const {
    if (!causal) return 0;
    return std::clamp<int64_t>(key - (keys - queries) - first_query, 0, QUERIES);
  }
};

// Cache-aligned arrays of one thread.
template <typename Real>
class Scratch {
 public:
  // Columns of outputs and values are padded to `pitch` with zeros, queries to QUERIES.
  Scratch(int64_t head_dim, int64_t pitch, int64_t probes)
      : pitch(pitch), q_size(head_dim * QUERIES), output_size(QUERIES * pitch) {
    const std::pair<Real**, int64_t> arrays[] = {{&q, q_size},
                                                 {&q_tangent, probes * q_size},
                                                 {&k, KEYS * head_dim},
                                                 {&k_tangent, KEYS * head_dim},
                                                 {&v, KEYS * pitch},
                                                 {&v_tangent, KEYS * pitch},
                                                 {&score, KEYS * QUERIES},
                                                 {&score_tangent, KEYS * QUERIES},
                                                 {&tangent_sum, probes * QUERIES},
                                                 {&tangent_mean, probes * QUERIES},
                                                 {&factor, QUERIES},
                                                 {&shift, QUERIES},
                                                 {&scale_sum, QUERIES},
                                                 {&output, output_size},
                                                 {&output_tangent, probes * output_size}};
    constexpr int64_t LINE = 64 / sizeof(Real);
    int64_t total = LINE;
    for (const auto& [array, size] : arrays) total += (size + LINE - 1) / LINE * LINE;
    memory_.reset(new Real[total]());
    Real* next = memory_.get() + (-reinterpret_cast<uintptr_t>(memory_.get()) % 64) / sizeof(Real);
    for (const auto& [array, size] : arrays) {
      *array = next;
      next += (size + LINE - 1) / LINE * LINE;
    }
  }

  Real *q, *q_tangent;               // [D, QUERIES], [P, D, QUERIES]
  Real *k, *k_tangent;               // [KEYS, D], the latter of one probe
  Real *v, *v_tangent;               // [KEYS, pitch], likewise
  Real *score, *score_tangent;       // [KEYS, QUERIES], likewise; then weights
  Real *tangent_sum, *tangent_mean;  // [P, QUERIES]: SoftmaxTangent
  Real *factor, *shift;              // [QUERIES]: SoftmaxTangent::Change
  Real* scale_sum;                   // [QUERIES]: sum p scale, of the scales of SharedTangents
  Real *output, *output_tangent;     // [QUERIES, pitch], [P, QUERIES, pitch]
  const int64_t pitch, q_size, output_size;

 private:
  std::unique_ptr<Real[]> memory_;
};

}  // namespace sparsecod::cpu::flash_attention
