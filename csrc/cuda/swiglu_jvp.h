#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

// gate_up [rows, 2 width] and gate_up_tangent [probes, rows, 2 width] -> output [rows, width] and output_tangent
// [probes, rows, width], all contiguous.
extern "C" cudaError_t sparsecod_swiglu_jvp(const void* gate_up, const void* gate_up_tangent, void* output,
                                            void* output_tangent, sparsecod::cuda::Dtype dtype, int64_t rows,
                                            int64_t width, int64_t probes, cudaStream_t stream);
