// sparsecod::flash_attention_jvp and, on CPU, flash_attention_jvp_shared: schemas, argument checks, shape inference,
// registration.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/operators.h"
#include "checks.h"
#include "on_cuda.h"

#if defined(SPARSECOD_CUDA)
#include "../cuda/flash_attention_jvp.h"
#endif

namespace sparsecod {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::ScalarType real_of(const at::Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Returns how many probes the tangents are of, if they have that dimension.
std::optional<c10::SymInt> check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& q_tangent, const at::Tensor& k_tangent, const at::Tensor& v_tangent,
                                 std::optional<double> scale, bool causal, int fewest_probes = 1) {
  check_floating("q", q);
  TORCH_CHECK_VALUE(q.dim() == 4 && q.sym_size(3) > 0, "q has shape ", q.sym_sizes(),
                    ", but must have shape [B, H, T, D] with D > 0");
  const c10::SymInt batch = q.sym_size(0), heads = q.sym_size(1), queries = q.sym_size(2), head_dim = q.sym_size(3);
  TORCH_CHECK_VALUE(k.dim() == 4 && k.sym_size(0) == batch && k.sym_size(3) == head_dim, "k has shape ", k.sym_sizes(),
                    ", but must have shape [", batch, ", H_kv, S, ", head_dim, "]");
  const c10::SymInt kv_heads = k.sym_size(1), keys = k.sym_size(2);
  TORCH_CHECK_VALUE(kv_heads > 0 && heads % kv_heads == 0, "k has ", kv_heads,
                    " heads, but must have a divisor of q's ", heads);
  TORCH_CHECK_VALUE(keys > 0, "k has shape ", k.sym_sizes(), ", but must have at least one key");
  TORCH_CHECK_VALUE(!causal || keys >= queries, "k has ", keys, " keys, but must have at least as many as q's ",
                    queries, " queries if causal");
  check_like("k", k, "q", q);
  check_same_shape("v", v, "k", k);
  check_like("v", v, "q", q);
  const auto probes = check_tangent("q_tangent", q_tangent, "q", q, fewest_probes);
  for (const auto& [argument, tangent] : {std::pair("k_tangent", k_tangent), std::pair("v_tangent", v_tangent)}) {
    const std::string meaning = probes ? "q_tangent's probes and k's shape " : "k's shape ";
    check_shape(argument, tangent, with_probes(probes, k.sym_sizes()), meaning);
    check_like(argument, tangent, "q", q);
  }
  TORCH_CHECK_VALUE(!scale || std::isfinite(*scale), "scale is ", *scale, ", but must be finite");
  return probes;
}

// Uninitialised, without gaps, the first three dimensions in the order in which `model` has them in memory; probes, if
// any, are outermost.
at::Tensor empty_in_order_of(const at::Tensor& model, const std::optional<c10::SymInt>& probes) {
  std::array<int64_t, 3> outermost_first = {0, 1, 2};
  std::stable_sort(outermost_first.begin(), outermost_first.end(),
                   [&](int64_t i, int64_t j) { return model.sym_stride(i) > model.sym_stride(j); });
  std::vector<c10::SymInt> strides(4, 1);
  c10::SymInt stride = model.sym_size(3);
  for (int i = 2; i >= 0; --i) {
    strides[outermost_first[i]] = stride;
    stride = stride * model.sym_size(outermost_first[i]);
  }
  if (probes) strides.insert(strides.begin(), stride);
  return at::empty_strided_symint(with_probes(probes, model.sym_sizes()), strides, model.options());
}

Result empty_results(const at::Tensor& q, const std::optional<c10::SymInt>& probes) {
  return {empty_in_order_of(q, std::nullopt), empty_in_order_of(q, probes),
          at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2)}, q.options().dtype(real_of(q)))};
}

void check(const cpu::SharedTangents& shared, const at::Tensor& q, const at::Tensor& k, const at::Tensor& q_tangent) {
  const c10::SymInt heads = q.sym_size(1), kv_heads = k.sym_size(1), keys = k.sym_size(2), head_dim = q.sym_size(3);
  TORCH_CHECK_VALUE(q_tangent.dim() == 5, "q_tangent has shape ", q_tangent.sym_sizes(),
                    ", but must have a number of probes before q's shape ", q.sym_sizes());
  TORCH_CHECK_VALUE(q.sym_size(2) == keys, "q has ", q.sym_size(2), " queries, but must have as many as k's ", keys,
                    " keys");
  TORCH_CHECK_VALUE(shared.q_offset.dim() == 4 && shared.q_offset.sym_size(0) > 0, "q_offset has shape ",
                    shared.q_offset.sym_sizes(), ", but must have shape [N, ", heads, ", ", keys, ", ", head_dim,
                    "] with N > 0");
  const c10::SymInt probes = shared.q_offset.sym_size(0);
  check_shape("q_offset", shared.q_offset, {probes, heads, keys, head_dim}, "probes and q's shape of one sequence ");
  check_shape("k_offset", shared.k_offset, {probes, kv_heads, keys, head_dim},
              "q_offset's probes and k's shape of one sequence ");
  check_shape("v_offset", shared.v_offset, {probes, kv_heads, head_dim},
              "q_offset's probes and v's shape of one key ");
  check_like("q_offset", shared.q_offset, "q", q);
  check_like("k_offset", shared.k_offset, "q", q);
  check_like("v_offset", shared.v_offset, "q", q);
  check_shape("token_scale", shared.scale, {q.sym_size(0), keys}, "k's batch and keys ");
  check_shape("token_rate", shared.rate, {probes, q.sym_size(0), keys}, "q_offset's probes and k's batch and keys ");
  for (const auto& [argument, of_tokens] :
       {std::pair("token_scale", shared.scale), std::pair("token_rate", shared.rate)}) {
    check_dtype(argument, of_tokens, real_of(q));
    TORCH_CHECK_VALUE(of_tokens.device() == q.device(), argument, " is on ", of_tokens.device(),
                      ", but must be on q's device ", q.device());
  }
}

// Returns o, o's tangent and log-sum-exp, not yet written.
Result prepare(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_tangent,
               const at::Tensor& k_tangent, const at::Tensor& v_tangent, std::optional<double> scale, bool causal) {
  const auto probes = check(q, k, v, q_tangent, k_tangent, v_tangent, scale, causal);
  return empty_results(q, probes);
}

Result prepare_shared(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_offset,
                      const at::Tensor& k_offset, const at::Tensor& v_offset, const at::Tensor& token_scale,
                      const at::Tensor& token_rate, const at::Tensor& q_tangent, const at::Tensor& k_tangent,
                      const at::Tensor& v_tangent, std::optional<double> scale, bool causal) {
  const auto probes = check(q, k, v, q_tangent, k_tangent, v_tangent, scale, causal, 0);
  check({q_offset, k_offset, v_offset, token_scale, token_rate}, q, k, q_tangent);
  return empty_results(q, q_offset.sym_size(0) + *probes);
}

double scale_or_default(std::optional<double> scale, const at::Tensor& q) {
  return scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
}

at::Tensor in_rows(const at::Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

at::Tensor in_probes(const at::Tensor& tensor) { return tensor.dim() == 5 ? tensor : tensor.unsqueeze(0); }

Result on_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_tangent,
              const at::Tensor& k_tangent, const at::Tensor& v_tangent, std::optional<double> scale, bool causal) {
  const Result result = prepare(q, k, v, q_tangent, k_tangent, v_tangent, scale, causal);
  const auto& [output, output_tangent, log_sum_exp] = result;
  if (output.numel() > 0) {
    cpu::flash_attention_jvp(in_rows(q), in_rows(k), in_rows(v), in_probes(in_rows(q_tangent)),
                             in_probes(in_rows(k_tangent)), in_probes(in_rows(v_tangent)), std::nullopt,
                             scale_or_default(scale, q), causal, output, in_probes(output_tangent), log_sum_exp);
  }
  return result;
}

Result shared_on_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_offset,
                     const at::Tensor& k_offset, const at::Tensor& v_offset, const at::Tensor& token_scale,
                     const at::Tensor& token_rate, const at::Tensor& q_tangent, const at::Tensor& k_tangent,
                     const at::Tensor& v_tangent, std::optional<double> scale, bool causal) {
  const Result result = prepare_shared(q, k, v, q_offset, k_offset, v_offset, token_scale, token_rate, q_tangent,
                                       k_tangent, v_tangent, scale, causal);
  const auto& [output, output_tangent, log_sum_exp] = result;
  if (output.numel() > 0) {
    const cpu::SharedTangents shared = {in_rows(q_offset).unsqueeze(1), in_rows(k_offset).unsqueeze(1),
                                        in_rows(v_offset).unsqueeze(1).unsqueeze(3), token_scale.contiguous(),
                                        token_rate.contiguous()};
    cpu::flash_attention_jvp(in_rows(q), in_rows(k), in_rows(v), in_rows(q_tangent), in_rows(k_tangent),
                             in_rows(v_tangent), shared, scale_or_default(scale, q), causal, output, output_tangent,
                             log_sum_exp);
  }
  return result;
}

#if defined(SPARSECOD_CUDA)
// The tensor itself if its rows start at multiples of 16 bytes, else a copy.
at::Tensor aligned(const at::Tensor& tensor) {
  bool fits = tensor.stride(-1) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < tensor.dim() - 1; ++i) {
    fits &= tensor.size(i) == 1 || tensor.stride(i) * tensor.element_size() % 16 == 0;
  }
  return fits ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

Result on_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_tangent,
               const at::Tensor& k_tangent, const at::Tensor& v_tangent, std::optional<double> scale, bool causal) {
  const Result result = prepare(q, k, v, q_tangent, k_tangent, v_tangent, scale, causal);
  const c10::cuda::CUDAGuard device(q.device());
  const int64_t head_dim = q.size(3);
  TORCH_CHECK_VALUE(head_dim % 8 == 0 && head_dim >= 32 && head_dim <= 256, "q has head dimension ", head_dim,
                    ", but must have a multiple of 8 from 32 to 256 on ", q.device());
  const auto& [output, output_tangent, log_sum_exp] = result;
  if (output.numel() == 0) return result;
  const std::array<at::Tensor, 8> tensors = {aligned(q),         aligned(k),         aligned(v),
                                             aligned(q_tangent), aligned(k_tangent), aligned(v_tangent),
                                             output,             output_tangent};
  std::array<int64_t, 3 * tensors.size()> strides;
  for (size_t i = 0; i < strides.size(); ++i) strides[i] = tensors[i / 3].stride(i % 3 - 4);
  const bool probed = output_tangent.dim() == 5;
  std::array<int64_t, 4> probe_strides{};
  for (size_t i = 0; i < 4; ++i) probe_strides[i] = probed ? tensors[i < 3 ? 3 + i : 7].stride(0) : 0;
  const auto input = [&](int i) { return tensors[i].const_data_ptr(); };
  C10_CUDA_CHECK(sparsecod_flash_attention_jvp(
      input(0), input(1), input(2), input(3), input(4), input(5), output.mutable_data_ptr(),
      output_tangent.mutable_data_ptr(), log_sum_exp.mutable_data_ptr<float>(), dtype_of(q), q.size(0), q.size(1),
      k.size(1), q.size(2), k.size(2), head_dim, strides.data(), probed ? output_tangent.size(0) : 1,
      probe_strides.data(), static_cast<float>(scale_or_default(scale, q)), causal,
      c10::cuda::getCurrentCUDAStream()));
  return result;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsecod, m) {
  m.def(
      "flash_attention_jvp(Tensor q, Tensor k, Tensor v, Tensor q_tangent, Tensor k_tangent, Tensor v_tangent, "
      "float? scale=None, bool causal=True) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "flash_attention_jvp_shared(Tensor q, Tensor k, Tensor v, Tensor q_offset, Tensor k_offset, Tensor v_offset, "
      "Tensor token_scale, Tensor token_rate, Tensor q_tangent, Tensor k_tangent, Tensor v_tangent, "
      "float? scale=None, bool causal=True) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparsecod, CPU, m) {
  m.impl("flash_attention_jvp", on_cpu);
  m.impl("flash_attention_jvp_shared", shared_on_cpu);
}
#if defined(SPARSECOD_CUDA)
TORCH_LIBRARY_IMPL(sparsecod, CUDA, m) { m.impl("flash_attention_jvp", on_cuda); }
#endif
TORCH_LIBRARY_IMPL(sparsecod, Meta, m) {
  m.impl("flash_attention_jvp", prepare);
  m.impl("flash_attention_jvp_shared", prepare_shared);
}
TORCH_LIBRARY_IMPL(sparsecod, Autograd, m) {
  m.impl("flash_attention_jvp", torch::autograd::autogradNotImplementedFallback());
  m.impl("flash_attention_jvp_shared", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sparsecod
