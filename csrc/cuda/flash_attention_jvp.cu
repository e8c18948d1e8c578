// Attention and its tangent: which kernel takes which dtype and head size.

#include "flash_attention_jvp.h"

#include "attention_problem.h"
#include "element.h"

namespace sparsecod::cuda {
namespace {

constexpr int64_t MAX_ROWS = int64_t{1} << 30;  // so that positions stay within 32 bits

template <typename T>
cudaError_t launch_mma(const AttentionProblem& problem, cudaStream_t stream) {
  const int head_dim = problem.head_dim;
  if (head_dim <= 32) return launch_flash_attention_jvp_mma<T, 32>(problem, stream);
  if (head_dim <= 64) return launch_flash_attention_jvp_mma<T, 64>(problem, stream);
  if (head_dim <= 96) return launch_flash_attention_jvp_mma<T, 96>(problem, stream);
  if (head_dim <= 128) return launch_flash_attention_jvp_mma<T, 128>(problem, stream);
  if (head_dim <= 192) return launch_flash_attention_jvp_mma<T, 192>(problem, stream);
  return launch_flash_attention_jvp_mma<T, 256>(problem, stream);
}

cudaError_t launch(Dtype dtype, const AttentionProblem& problem, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::FLOAT32: return launch_flash_attention_jvp_float32(problem, stream);
    case Dtype::BFLOAT16: return launch_mma<__nv_bfloat16>(problem, stream);
    case Dtype::FLOAT16: return launch_mma<__half>(problem, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace sparsecod::cuda

cudaError_t sparsecod_flash_attention_jvp(const void* q, const void* k, const void* v, const void* q_tangent,
                                          const void* k_tangent, const void* v_tangent, void* output,
                                          void* output_tangent, float* log_sum_exp, sparsecod::cuda::Dtype dtype,
                                          int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,
                                          int64_t keys, int64_t head_dim, const int64_t* strides, int64_t probes,
                                          const int64_t* probe_strides, float scale, bool causal,
                                          cudaStream_t stream) {
  using namespace sparsecod::cuda;
  if (head_dim % 8 != 0 || head_dim < 32 || head_dim > 256 || heads % kv_heads != 0) return cudaErrorInvalidValue;
  if (batch > MAX_ROWS || heads > MAX_ROWS || queries > MAX_ROWS || keys > MAX_ROWS) return cudaErrorInvalidValue;
  if (causal && keys < queries) return cudaErrorInvalidValue;
  const auto tensor = [&](const void* data, int index) {
    const int64_t* of = strides + 3 * index;
    return AttentionTensor{const_cast<void*>(data), of[0], of[1], of[2]};
  };
  AttentionProblem problem = {tensor(q, 0),         tensor(k, 1),      tensor(v, 2),
                              tensor(q_tangent, 3), tensor(k_tangent, 4), tensor(v_tangent, 5),
                              tensor(output, 6),    tensor(output_tangent, 7), log_sum_exp};
  problem.batch = static_cast<int>(batch);
  problem.heads = static_cast<int>(heads);
  problem.kv_heads = static_cast<int>(kv_heads);
  problem.queries = static_cast<int>(queries);
  problem.keys = static_cast<int>(keys);
  problem.head_dim = static_cast<int>(head_dim);
  problem.scale = scale;
  problem.causal = causal;
  // Not yet fused: the primal is computed, and written, for every probe.
  for (int64_t probe = 0; probe < probes; ++probe) {
    SPARSECOD_RETURN_IF_ERROR(launch(dtype, problem, stream));
    AttentionTensor* const tangents[] = {&problem.q_tangent, &problem.k_tangent, &problem.v_tangent,
                                         &problem.output_tangent};
    const int64_t element_bytes = dtype == Dtype::FLOAT32 ? 4 : 2;
    for (int i = 0; i < 4; ++i) {
      tangents[i]->data = static_cast<char*>(tangents[i]->data) + probe_strides[i] * element_bytes;
    }
  }
  return cudaSuccess;
}
