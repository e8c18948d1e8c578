// Head sizes up to 96. One file per size, so that they compile side by side.

#include "flash_attention_jvp_mma.h"

namespace sparsecod::cuda {

template cudaError_t launch_flash_attention_jvp_mma<__nv_bfloat16, 96>(AttentionProblem, cudaStream_t);
template cudaError_t launch_flash_attention_jvp_mma<__half, 96>(AttentionProblem, cudaStream_t);

}  // namespace sparsecod::cuda
