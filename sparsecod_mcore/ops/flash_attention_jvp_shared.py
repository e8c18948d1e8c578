"""`flash_attention_jvp` along directions that are the same at every token, which takes less work.

Axes: as in flash_attention_jvp.py, and N probes of such directions; S = T.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecod_mcore.ops.cuda_build import without_values
from sparsecod_mcore.ops.flash_attention_jvp import flash_attention_jvp

_OPERATOR = torch.ops.sparsecod.flash_attention_jvp_shared.default


class SharedTangents(NamedTuple):
    """Tangents of the form token_scale * offset + token_rate * x, for x each of q, k and v.

    RMSNorm, a projection and a rotation by position make such of a direction that is the same at every token.
    """

    q_offset: Tensor  # [N, H, T, D], of q's dtype
    k_offset: Tensor  # [N, H_kv, S, D]
    v_offset: Tensor  # [N, H_kv, D], the same at every token
    token_scale: Tensor  # [B, S], float32 (float64 for float64)
    token_rate: Tensor  # [N, B, S], likewise

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tangents themselves, [N, ...] of q [B, H, T, D], k and v [B, H_kv, S, D]."""
        scale_B1S1, rate_NB1S1 = self.token_scale[:, None, :, None], self.token_rate[:, :, None, :, None]
        offsets = self.q_offset[:, None], self.k_offset[:, None], self.v_offset[:, None, :, None]
        pairs = zip(offsets, (q, k, v), strict=True)
        q_tangent, k_tangent, v_tangent = (
            (scale_B1S1 * offset).addcmul_(rate_NB1S1, x).to(x.dtype) for offset, x in pairs
        )
        return q_tangent, k_tangent, v_tangent


def flash_attention_jvp_shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared: SharedTangents,
    q_tangent: Tensor,
    k_tangent: Tensor,
    v_tangent: Tensor,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `flash_attention_jvp` does, of the tangents in `shared` and then of P others.

    The kernel for CPU never writes the former down, and needs one product less for each: with v'_j = a_j u + r_j v_j,

        o' = sum_j p_j (s'_j + r_j) v_j - (sum_j p_j s'_j) o + (sum_j p_j a_j) u.

    On CUDA they are written out for `flash_attention_jvp`.

    Args:
        q: [B, H, T, D], as `flash_attention_jvp` takes it, and so are k and v, [B, H_kv, S, D], with S = T.
        k: see q.
        v: see q.
        shared: tangents of N probes, at least one.
        q_tangent: [P, B, H, T, D], tangents of other probes; P may be 0.
        k_tangent: likewise, of k.
        v_tangent: likewise, of v.
        scale: factor of the scores; None for 1 / sqrt(D).
        causal: whether query i sees keys j <= i only.

    Returns:
        o, its tangents [N + P, B, H, T, D], and the log-sum-exp of the scores.

    Raises:
        ValueError: names the argument that does not fit, what was given and what is accepted.
    """
    return _OPERATOR(q, k, v, *shared, q_tangent, k_tangent, v_tangent, scale, causal)


def flash_attention_jvp_written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: Tensor,
    k_offset: Tensor,
    v_offset: Tensor,
    token_scale: Tensor,
    token_rate: Tensor,
    q_tangent: Tensor,
    k_tangent: Tensor,
    v_tangent: Tensor,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_attention_jvp_shared` by way of `flash_attention_jvp`, for devices without a kernel; takes its schema."""
    shared = SharedTangents(q_offset, k_offset, v_offset, token_scale, token_rate)
    others = (q_tangent, k_tangent, v_tangent)
    _OPERATOR(*(without_values(x) for x in (q, k, v, *shared, *others)), scale, causal)  # checks arguments
    all_q, all_k, all_v = (torch.cat(pair) for pair in zip(shared.of(q, k, v), others, strict=True))
    return flash_attention_jvp(q, k, v, all_q, all_k, all_v, scale, causal)


torch.library.impl("sparsecod::flash_attention_jvp_shared", "CUDA")(flash_attention_jvp_written_out)
