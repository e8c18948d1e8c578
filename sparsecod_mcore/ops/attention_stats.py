"""Entropy and sparsity of attention weights, without the weights.

The kernels are csrc/cpu/attention_stats.cpp and csrc/cuda/attention_stats.cu.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsecod_mcore.ops.cuda_build import register_cuda_fallback

_OPERATOR = torch.ops.sparsecod.attention_stats.default


def attention_stats(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    lse_BHT: Tensor,
    scale: float,
    thresholds: Sequence[float],
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return, per head, the sum over queries of their attention's entropy, and how many weights are below thresholds.

    Query i gives to key j the weight A_ij = exp(s_ij - lse_i), s_ij = scale q_i . k_j. Over the keys that it sees, its
    entropy is -sum_j A_ij ln A_ij (Eq. 21-23; in nats), and a weight counts if A_ij < threshold (Eq. 15, 16). Of T
    queries and S keys, causal query i sees keys j <= i + S - T. Weights are never stored: they are recomputed from the
    log-sum-exp that flash attention leaves. float32 arithmetic (float64 for float64), sums over tiles of keys in
    float64; a weight within rounding of a threshold may count on either side. An element that is not finite makes its
    head's entropy NaN. Not differentiable.

    Args:
        q_BHTD: [B, H, T, D], float32, bfloat16, float16, or on CPU float64; of any strides. If D is not contiguous, or
            on CUDA rows of bfloat16 and float16 are not aligned to 16 bytes, it is copied. There they have
            D = 32, 40, ..., 256.
        k_BHSD: [B, H_kv, S, D], of the dtype and device of `q_BHTD`; H is a multiple of H_kv, and consecutive heads
            share one of `k_BHSD`. If causal, S >= T.
        lse_BHT: [B, H, T], ln sum_j exp(s_ij) over the keys that are seen; float32, or float64 if `q_BHTD` is.
        scale: usually D ** -0.5.
        thresholds: at most 8 positive numbers, in any order. On CUDA each four take a pass.
        causal: whether a query sees no later keys; otherwise it sees all.

    Returns:
        Entropy [B, H], float64, and counts [B, H, thresholds], int64. The weights that could have counted are
        T S of each head, and if causal T (S - T) + T (T + 1) / 2.

    Raises:
        ValueError: names the argument that does not fit, what was given and what is accepted.
    """
    return _OPERATOR(q_BHTD, k_BHSD, lse_BHT, scale, thresholds, causal)


def attention_stats_reference(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    lse_BHT: Tensor,
    scale: float,
    thresholds: Sequence[float],
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """`attention_stats` in plain PyTorch, for any device; stores weights [B, H, T, S]."""
    batch, heads, queries = lse_BHT.shape
    keys = k_BHSD.shape[2]
    group = heads // k_BHSD.shape[1]
    visible_TS = torch.ones(queries, keys, dtype=torch.bool, device=q_BHTD.device)
    if causal:
        visible_TS = visible_TS.tril(keys - queries)
    q, k = q_BHTD.detach().to(lse_BHT.dtype), k_BHSD.detach().to(lse_BHT.dtype).repeat_interleave(group, 1)
    log_BHTS = scale * (q @ k.transpose(-1, -2)) - lse_BHT.detach()[..., None]
    entropy_BHTS = (-log_BHTS.exp() * log_BHTS).where(visible_TS, 0)
    counts = [((log_BHTS.exp() < threshold) & visible_TS).sum((-1, -2)) for threshold in thresholds]
    none = torch.zeros(batch, heads, 0, dtype=torch.int64, device=q_BHTD.device)
    return entropy_BHTS.sum((-1, -2), dtype=torch.float64), torch.stack(counts, -1) if counts else none


register_cuda_fallback("attention_stats", attention_stats_reference)
