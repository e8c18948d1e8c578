// sparsecod::attention_stats: schema, argument checks, shape inference, registration.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../cpu/operators.h"
#include "checks.h"
#include "on_cuda.h"

#if defined(SPARSECOD_CUDA)
#include "../cuda/attention_stats.h"
#endif

namespace sparsecod {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor>;

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& lse, double scale,
           at::ArrayRef<double> thresholds, bool causal) {
  check_floating("q", q);
  TORCH_CHECK_VALUE(q.dim() == 4 && q.sym_size(3) > 0, "q has shape ", q.sym_sizes(),
                    ", but must have shape [B, H, T, D]");
  TORCH_CHECK_VALUE(k.dim() == 4 && k.sym_size(0) == q.sym_size(0) && k.sym_size(3) == q.sym_size(3), "k has shape ",
                    k.sym_sizes(), ", but must have shape [B, H_kv, S, D] with B and D as in q's shape ",
                    q.sym_sizes());
  check_like("k", k, "q", q);
  TORCH_CHECK_VALUE(k.sym_size(1) > 0 && q.sym_size(1) % k.sym_size(1) == 0, "k has ", k.sym_size(1),
                    " heads, but must have a divisor of q's ", q.sym_size(1));
  TORCH_CHECK_VALUE(!causal || k.sym_size(2) >= q.sym_size(2), "k has ", k.sym_size(2),
                    " positions, but must have at least q's ", q.sym_size(2), ", the last of which sees all");
  check_shape("lse", lse, q.sym_sizes().slice(0, 3), "q's first dimensions ");
  check_dtype("lse", lse, q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  TORCH_CHECK_VALUE(lse.device() == q.device(), "lse is on ", lse.device(), ", but must be on q's device ",
                    q.device());
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale is ", scale, ", but must be finite");
  check_thresholds(thresholds, 0);
}

bool is_empty(const at::Tensor& q, const at::Tensor& k) { return q.numel() == 0 || k.numel() == 0; }

Result zeros(const at::Tensor& q, at::ArrayRef<double> thresholds) {
  const int64_t batch = q.size(0), heads = q.size(1), num_thresholds = thresholds.size();
  return {at::zeros({batch, heads}, q.options().dtype(at::kDouble)),
          at::zeros({batch, heads, num_thresholds}, q.options().dtype(at::kLong))};
}

Result on_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& lse, double scale,
              at::ArrayRef<double> thresholds, bool causal) {
  check(q, k, lse, scale, thresholds, causal);
  const Result result = zeros(q, thresholds);
  if (!is_empty(q, k)) {
    const auto rows = [](const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
    cpu::attention_stats(rows(q), rows(k), lse.contiguous(), scale, thresholds, causal, std::get<0>(result),
                         std::get<1>(result));
  }
  return result;
}

#if defined(SPARSECOD_CUDA)
// Rows as the kernels want them: contiguous, and on tensor cores aligned to 16 bytes.
at::Tensor in_rows(const at::Tensor& x) {
  const auto aligned = [](const at::Tensor& x) {
    const auto in_packs = [](int64_t stride) { return stride % 8 == 0; };
    return x.scalar_type() == at::kFloat || (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
                                             std::all_of(x.strides().begin(), x.strides().begin() + 3, in_packs));
  };
  return x.stride(3) == 1 && aligned(x) ? x : x.clone(at::MemoryFormat::Contiguous);
}

Result on_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& lse, double scale,
               at::ArrayRef<double> thresholds, bool causal) {
  check(q, k, lse, scale, thresholds, causal);
  TORCH_CHECK_VALUE(q.scalar_type() == at::kFloat || cuda::supported_head_dim(q.size(3)), "q has head dimension ",
                    q.size(3), ", but in ", name(q.scalar_type()),
                    " on CUDA it must be a multiple of 8 from 32 to 256");
  const c10::cuda::CUDAGuard device(q.device());
  const Result result = zeros(q, thresholds);
  if (!is_empty(q, k)) {
    const at::Tensor queries = in_rows(q), keys = in_rows(k), lse_rows = lse.contiguous();
    cuda::AttentionShape shape = {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), {}, {}, causal};
    for (int i = 0; i < 3; ++i) {
      shape.q_strides[i] = queries.stride(i);
      shape.k_strides[i] = keys.stride(i);
    }
    const at::Tensor scratch = at::empty({sparsecod_attention_stats_scratch(&shape)}, q.options().dtype(at::kByte));
    C10_CUDA_CHECK(sparsecod_attention_stats(
        queries.const_data_ptr(), keys.const_data_ptr(), lse_rows.const_data_ptr<float>(), dtype_of(q), &shape, scale,
        thresholds.data(), thresholds.size(), scratch.mutable_data_ptr(),
        std::get<0>(result).mutable_data_ptr<double>(), std::get<1>(result).mutable_data_ptr<int64_t>(),
        c10::cuda::getCurrentCUDAStream()));
  }
  return result;
}
#endif

Result on_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& lse, double scale,
               at::ArrayRef<double> thresholds, bool causal) {
  check(q, k, lse, scale, thresholds, causal);
  const c10::SymInt batch = q.sym_size(0), heads = q.sym_size(1), num_thresholds = thresholds.size();
  return {at::empty_symint({batch, heads}, q.options().dtype(at::kDouble)),
          at::empty_symint({batch, heads, num_thresholds}, q.options().dtype(at::kLong))};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsecod, m) {
  m.def(
      "attention_stats(Tensor q, Tensor k, Tensor lse, float scale, float[] thresholds, bool causal=True) -> "
      "(Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparsecod, CPU, m) { m.impl("attention_stats", on_cpu); }
#if defined(SPARSECOD_CUDA)
TORCH_LIBRARY_IMPL(sparsecod, CUDA, m) { m.impl("attention_stats", on_cuda); }
#endif
TORCH_LIBRARY_IMPL(sparsecod, Meta, m) { m.impl("attention_stats", on_meta); }
TORCH_LIBRARY_IMPL(sparsecod, Autograd, m) {
  m.impl("attention_stats", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sparsecod
