#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

// Adds to counts [num_tensors, num_thresholds], on the device, how many of the sizes[i] elements at tensors[i] have a
// magnitude below each threshold. The other arrays are on the host and are read before this returns.
extern "C" cudaError_t sparsecod_count_below(const void* const* tensors, const int64_t* sizes,
                                             const sparsecod::cuda::Dtype* dtypes, int64_t num_tensors,
                                             const double* thresholds, int64_t num_thresholds, int64_t* counts,
                                             cudaStream_t stream);
