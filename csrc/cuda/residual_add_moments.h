#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

// Bytes of scratch memory that a launch needs; their content does not matter. They begin aligned to 16.
extern "C" cudaError_t sparsecod_residual_add_moments_scratch(sparsecod::cuda::Dtype dtype, int64_t rows,
                                                              int64_t width, bool with_columns, int64_t* bytes);

// branch, residual and output [rows, width], bias [width] or null, moments [NUM_MOMENTS], columns [NUM_COLUMN_SUMS,
// width] or null; all contiguous, rows and width > 0.
extern "C" cudaError_t sparsecod_residual_add_moments(const void* branch, const void* residual, const void* bias,
                                                      void* output, double* moments, double* columns, void* scratch,
                                                      sparsecod::cuda::Dtype dtype, int64_t rows, int64_t width,
                                                      cudaStream_t stream);
