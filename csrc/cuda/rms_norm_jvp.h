#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

// x and y [rows, width], x_tangent and y_tangent [probes, rows, width] of `dtype`, weight [width] of `weight_dtype`,
// which is `dtype` or float32; all contiguous and not empty.
extern "C" cudaError_t sparsecod_rms_norm_jvp(const void* x, const void* x_tangent, const void* weight, void* y,
                                              void* y_tangent, sparsecod::cuda::Dtype dtype,
                                              sparsecod::cuda::Dtype weight_dtype, int64_t rows, int64_t width,
                                              int64_t probes, float eps, cudaStream_t stream);
