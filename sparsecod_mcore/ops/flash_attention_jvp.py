"""Softmax attention and its tangent, without the T x S matrix of scores in memory.

The kernels are csrc/cpu/flash_attention_jvp.cpp and csrc/cuda/flash_attention_jvp*, the maths of all
csrc/common/softmax.h. They extend FlashAttention-2 (Dao, 2023, arXiv:2307.08691) to dual numbers.

Axes: P probes, B batch, H query heads, T queries, S keys, D head dimension; N probes along directions that are the same
at every token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecod_mcore.ops.cuda_build import register_cuda_fallback, without_values

_OPERATOR = torch.ops.sparsecod.flash_attention_jvp.default
_SHARED_OPERATOR = torch.ops.sparsecod.flash_attention_jvp_shared.default
_WITH_SHARED_KERNEL = ("cpu", "meta")  # devices


class SharedTangents(NamedTuple):
    """Tangents of the form token_scale * offset + token_rate * x, for x each of q, k and v; S = T.

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


def flash_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor,
    k_tangent: Tensor,
    v_tangent: Tensor,
    scale: float | None = None,
    causal: bool = True,
    shared: SharedTangents | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o = softmax(scale q k^T) v, its derivative along the tangents, and log-sum-exp of the scores.

    With weights p, scores s and s' = scale (q' k^T + q k'^T), for each query

        o' = sum_j p_j (s'_j v_j + v'_j) - (sum_j p_j s'_j) o.

    Along `shared`, where v'_j = a_j u + r_j v_j, the CPU kernel writes no tangent down and needs one product less,

        o' = sum_j p_j (s'_j + r_j) v_j - (sum_j p_j s'_j) o + (sum_j p_j a_j) u;

    on CUDA they are written out.

    Sums are float32 (float64 for float64); results are rounded once. CUDA kernels for bfloat16 and float16 round p
    and p (s' - c), c the mean of s' over the keys so far, to the inputs' dtype before they multiply v.
    Not differentiable: backward through a result raises.

    Args:
        q: [B, H, T, D], float32, bfloat16, float16, or on CPU float64. Strides are free, so Megatron's [T, B, H, D] can
            be passed as a permuted view; where the last dimension is not contiguous, or rows do not start at
            multiples of 16 bytes on CUDA, a copy is made. D is any on CPU, and on CUDA a multiple of 8 from 32 to 256.
        k: [B, H_kv, S, D], of q's dtype and device. H is a multiple of H_kv: query head h uses key head
            h // (H / H_kv).
        v: k's shape, q's dtype and device.
        q_tangent: tangent of q, of its shape, dtype and device; or [P, B, H, T, D], the tangents of P probes of the one
            q, for which scores and weights are computed once on CPU (CUDA's kernels run once per probe).
        k_tangent: tangent of k, likewise; all three have probes, or none has.
        v_tangent: tangent of v, likewise.
        scale: factor of the scores; None for 1 / sqrt(D).
        causal: whether query i sees keys j <= i + (S - T) only, so that the last query sees all; needs S >= T.
        shared: tangents of N probes more, at least one. The others must have probes too, of which P may then be 0.

    Returns:
        o, like q, and its tangent, like q_tangent, those of `shared` first ([N + P, B, H, T, D]), B, H and T in the
        order in which q has them in memory; and the natural logarithm of sum_j exp(s_j), [B, H, T], contiguous, float32
        (float64 for float64).

    Raises:
        ValueError: names the argument that does not fit, what was given and what is accepted.
    """
    others = q_tangent, k_tangent, v_tangent
    if shared is None:
        return _OPERATOR(q, k, v, *others, scale, causal)
    if q.device.type in _WITH_SHARED_KERNEL:
        return _SHARED_OPERATOR(q, k, v, *shared, *others, scale, causal)
    _SHARED_OPERATOR(*(without_values(x) for x in (q, k, v, *shared, *others)), scale, causal)  # checks arguments
    return _OPERATOR(q, k, v, *map(torch.cat, zip(shared.of(q, k, v), others, strict=True)), scale, causal)


def flash_attention_jvp_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor,
    k_tangent: Tensor,
    v_tangent: Tensor,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_attention_jvp` in plain PyTorch, for any device and head dimension; holds all T x S scores at once."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    q_BHTD, q_tangent_BHTD = q.to(dtype), q_tangent.to(dtype)  # here and below, tangents may have probes in front
    k_BHSD, v_BHSD, k_tangent_BHSD, v_tangent_BHSD = (
        x.to(dtype).repeat_interleave(group, dim=-3) for x in (k, v, k_tangent, v_tangent)
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores_BHTS = scale * (q_BHTD @ k_BHSD.mT)
    tangent_BHTS = scale * (q_tangent_BHTD @ k_BHSD.mT + q_BHTD @ k_tangent_BHSD.mT)
    if causal:
        T, S = scores_BHTS.shape[-2:]
        unseen_TS = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores_BHTS = scores_BHTS.masked_fill(unseen_TS, -torch.inf)
    weights_BHTS = scores_BHTS.softmax(-1)
    mean_tangent_BHT1 = (weights_BHTS * tangent_BHTS).sum(-1, keepdim=True)
    weight_tangents_BHTS = weights_BHTS * (tangent_BHTS - mean_tangent_BHT1)
    output_BHTD = weights_BHTS @ v_BHSD
    output_tangent_BHTD = weight_tangents_BHTS @ v_BHSD + weights_BHTS @ v_tangent_BHSD
    return output_BHTD.to(q.dtype), output_tangent_BHTD.to(q.dtype), scores_BHTS.logsumexp(-1)


register_cuda_fallback("flash_attention_jvp", flash_attention_jvp_reference)
