"""What is summed over tokens of a Jacobian probe: v in, u_t = ((J - I) v)_t at token t out.

The kernels are csrc/cpu/probe_moments.cpp and csrc/cuda/probe_moments.cu.
"""

from enum import IntEnum, auto

import torch
from torch import Tensor

from sparsecod_mcore.ops.cuda_build import register_cuda_fallback


class ProbeMoment(IntEnum):
    """Index into the moments of a probe, a float64 vector; csrc/common/probe_moments.h has the same list.

    All are sums over tokens t, so moments of different tokens combine by addition:

    SQUARED_NORM    ||u_t||^2
    PRODUCT         v_t . u_t
    TOKENS          1

    For probes v ~ N(0, I) and E the mean over probes, J the token-averaged Jacobian: ||J - I||_F^2 is
    E ||sums / TOKENS||^2, tr(J) / D is 1 + E[PRODUCT / TOKENS] / D, both with one v for all tokens; and the mean over
    tokens of the squared norm of the token's own J - I is E[SQUARED_NORM / TOKENS], with a v for each.
    """

    SQUARED_NORM = 0
    PRODUCT = auto()
    TOKENS = auto()


NUM_PROBE_MOMENTS = len(ProbeMoment)
_OPERATOR = torch.ops.sparsecod.probe_moments.default


def probe_moments(v: Tensor, u: Tensor, sums: Tensor, moments: Tensor) -> None:
    """Add u summed over tokens to `sums` and the moments of every probe to `moments`.

    The vectors are summed before any norm is taken, so that `sums` of several ranks can be added up. Few tokens are
    added in float32 (float64 for float64) before they go to float64. An empty input adds nothing. No gradient passes.

    Args:
        v: [P, D], the same at all tokens of a probe, or [P, N, D]; of the dtype and device of `u`, of any strides.
        u: [P, N, D] for P probes and N tokens; float32, bfloat16, float16, or on CPU float64; of any strides.
        sums: [P, D], float64, contiguous, on the device of `u`.
        moments: [P, NUM_PROBE_MOMENTS], float64, contiguous, on the device of `u`; indexed by `ProbeMoment`.

    Raises:
        ValueError: names the argument that does not fit, what was given and what is accepted.
    """
    _OPERATOR(v, u, sums, moments)


def probe_moments_reference(v: Tensor, u: Tensor, sums: Tensor, moments: Tensor) -> None:
    """`probe_moments` in plain PyTorch, for any device and without waiting for it."""
    if u.numel() == 0:
        return
    dtype = torch.promote_types(u.dtype, torch.float32)
    u_PND = u.detach().to(dtype)
    v_PND = v.detach().to(dtype)
    if v.dim() == 2:
        v_PND = v_PND.unsqueeze(1)
    sums += u_PND.sum(1)
    moments[:, ProbeMoment.SQUARED_NORM] += u_PND.square().sum(-1).sum(-1, dtype=torch.float64)
    moments[:, ProbeMoment.PRODUCT] += (u_PND * v_PND).sum(-1).sum(-1, dtype=torch.float64)
    moments[:, ProbeMoment.TOKENS] += u.shape[1]


register_cuda_fallback("probe_moments", probe_moments_reference)
