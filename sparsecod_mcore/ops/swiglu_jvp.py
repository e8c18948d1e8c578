"""SwiGLU and its tangent: y = silu(a) b, and the derivative of y along a tangent of (a, b).

The kernels are csrc/cpu/swiglu_jvp.cpp and csrc/cuda/swiglu_jvp.cu, the maths of both csrc/common/dual.h.
"""

import torch
from torch import Tensor

from sparsecod_mcore.ops.cuda_build import register_cuda_fallback

_OPERATOR = torch.ops.sparsecod.swiglu_jvp.default


def swiglu_jvp(gate_up: Tensor, gate_up_tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return y = silu(a) b and its tangent, for gate_up = [a, b] side by side, as Megatron's SwiGLU takes them.

    With s = sigmoid(a), the tangent is (s + a s (1 - s)) a' b + a s b'. Both are computed in float32 (float64 for
    float64) and rounded once. Not differentiable: backward through either raises.

    Args:
        gate_up: [..., 2 F], float32, bfloat16, float16, or on CPU float64; of any strides.
        gate_up_tangent: the shape, dtype and device of `gate_up`; or [P, ..., 2 F], the tangents of P probes of the
            one `gate_up`.

    Returns:
        y, [..., F], and its tangent, [..., F] or [P, ..., F]; contiguous, of the dtype of `gate_up`.

    Raises:
        ValueError: names the argument that does not fit, what was given and what is accepted.
    """
    return _OPERATOR(gate_up, gate_up_tangent)


def swiglu_jvp_reference(gate_up: Tensor, gate_up_tangent: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_jvp` in plain PyTorch, for any device."""
    dtype = torch.promote_types(gate_up.dtype, torch.float32)
    a, b = gate_up.to(dtype).chunk(2, -1)
    a_tangent, b_tangent = gate_up_tangent.to(dtype).chunk(2, -1)
    sigmoid = a.sigmoid()
    silu = a * sigmoid
    tangent = (sigmoid + silu * (1 - sigmoid)) * a_tangent * b + silu * b_tangent
    return (silu * b).to(gate_up.dtype), tangent.to(gate_up.dtype)


register_cuda_fallback("swiglu_jvp", swiglu_jvp_reference)
