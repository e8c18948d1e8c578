"""RMSNorm and its tangent: y = w r x with r = (mean_j x_j^2 + eps)^(-1/2), and its derivative along a tangent of x.

The kernels are csrc/cpu/rms_norm_jvp.cpp and csrc/cuda/rms_norm_jvp.cu, the maths of both csrc/common/rms_norm.h.
"""

import torch
from torch import Tensor

from sparsecod_mcore.ops.cuda_build import register_cuda_fallback

_OPERATOR = torch.ops.sparsecod.rms_norm_jvp.default


def rms_norm_jvp(x: Tensor, x_tangent: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y = w r x over the last axis, as `torch.nn.functional.rms_norm` (Zhang & Sennrich 2019), and its tangent.

    The tangent is w (r x' + r' x), with r' = -r^3 mean_j(x_j x'_j). Both are computed in float32 (float64 for float64)
    and rounded once. Not differentiable: backward through either raises.

    Args:
        x: [..., D], float32, bfloat16, float16, or on CPU float64; of any strides.
        x_tangent: the shape, dtype and device of `x`; or [P, ..., D], the tangents of P probes of the one `x`.
        weight: w, [D], of the dtype of `x` or float32, on the device of `x`.
        eps: at least 0.

    Returns:
        y, of the shape of `x`, and its tangent, of that of `x_tangent`; contiguous, of the dtype of `x`.

    Raises:
        ValueError: names the argument that does not fit, what was given and what is accepted.
    """
    return _OPERATOR(x, x_tangent, weight, eps)


def rms_norm_jvp_reference(x: Tensor, x_tangent: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm_jvp` in plain PyTorch, for any device."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    primal, tangent, w = x.to(dtype), x_tangent.to(dtype), weight.to(dtype)
    r = (primal.square().mean(-1, keepdim=True) + eps).rsqrt()
    r_tangent = -r.pow(3) * (primal * tangent).mean(-1, keepdim=True)
    y, y_tangent = primal * r * w, (tangent * r + primal * r_tangent) * w
    return y.to(x.dtype).contiguous(), y_tangent.to(x.dtype).contiguous()


register_cuda_fallback("rms_norm_jvp", rms_norm_jvp_reference)
