// From tensors to the C launchers of csrc/cuda.

#pragma once

#if defined(SPARSECOD_CUDA)

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/dtype.h"

namespace sparsecod {

inline cuda::Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return cuda::Dtype::FLOAT32;
    case at::kBFloat16: return cuda::Dtype::BFLOAT16;
    case at::kHalf: return cuda::Dtype::FLOAT16;
    default: TORCH_INTERNAL_ASSERT(false, "unchecked dtype");
  }
}

}  // namespace sparsecod

#endif
