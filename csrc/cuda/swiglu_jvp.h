#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

// gate_up and gate_up_tangent [rows, 2 width] -> output and output_tangent [rows, width], all contiguous.
extern "C" cudaError_t sparsecod_swiglu_jvp(const void* gate_up, const void* gate_up_tangent, void* output,
                                            void* output_tangent, sparsecod::cuda::Dtype dtype, int64_t rows,
                                            int64_t width, cudaStream_t stream);
