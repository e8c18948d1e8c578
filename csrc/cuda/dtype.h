// Element types as the C launchers are told them.

#pragma once

namespace sparsecod::cuda {

enum class Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

}  // namespace sparsecod::cuda
