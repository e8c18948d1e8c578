#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

// How many doubles of workspace sparsecod_probe_moments wants on the current device.
extern "C" cudaError_t sparsecod_probe_moments_workspace(sparsecod::cuda::Dtype dtype, int64_t probes, int64_t tokens,
                                                         int64_t width, int64_t* doubles);

// v [probes, width], or [probes, tokens, width] if v_per_token, and u [probes, tokens, width], contiguous and not
// empty; adds to sums [probes, width] and moments [probes, 3], indexed by ProbeMoment.
extern "C" cudaError_t sparsecod_probe_moments(const void* v, const void* u, double* sums, double* moments,
                                               double* workspace, sparsecod::cuda::Dtype dtype, bool v_per_token,
                                               int64_t probes, int64_t tokens, int64_t width, cudaStream_t stream);
