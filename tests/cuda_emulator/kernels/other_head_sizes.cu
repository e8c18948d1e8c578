// Stands in for the kernels of csrc/cuda/flash_attention_jvp_*.cu, but those of 32, where a test compiles no others.

#include "attention_problem.h"
#include "element.h"

namespace sparsecod::cuda {

#define SPARSECOD_STAND_IN(T, D)                                                         \
  template <>                                                                            \
  cudaError_t launch_flash_attention_jvp_mma<T, D>(AttentionProblem, cudaStream_t) { \
    return cudaErrorInvalidValue;                                                        \
  }
#define SPARSECOD_STAND_INS(D)         \
  SPARSECOD_STAND_IN(__nv_bfloat16, D) \
  SPARSECOD_STAND_IN(__half, D)

SPARSECOD_STAND_INS(64)
SPARSECOD_STAND_INS(96)
SPARSECOD_STAND_INS(128)
SPARSECOD_STAND_INS(192)
SPARSECOD_STAND_INS(256)

}  // namespace sparsecod::cuda
