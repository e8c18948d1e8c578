// Moments of Jacobian probes: what is summed over tokens for u_t = ((J - I) v)_t, for CPU and CUDA kernels.

#pragma once

// clang-format off
#define SPARSECOD_PROBE_MOMENTS(X) \
  X(SQUARED_NORM)  /* sum over tokens of ||u_t||^2 */ \
  X(PRODUCT)       /* sum over tokens of v_t . u_t */ \
  X(TOKENS)        /* number of tokens */
// clang-format on

namespace sparsecod {

// Index into a probe's moments; sparsecod_mcore.ops.ProbeMoment is the same list.
struct ProbeMoment {
#define SPARSECOD_ENUMERATE(name) name,
  enum : int { SPARSECOD_PROBE_MOMENTS(SPARSECOD_ENUMERATE) COUNT };
#undef SPARSECOD_ENUMERATE
};

}  // namespace sparsecod
