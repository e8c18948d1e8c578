// Functions that C++ and CUDA kernels share.

#pragma once

#if defined(__CUDACC__)
#define SPARSECOD_HOST_DEVICE __host__ __device__ __forceinline__
#else  // lanes wider than the baseline's registers must not cross a call
#define SPARSECOD_HOST_DEVICE inline __attribute__((always_inline))
#endif
