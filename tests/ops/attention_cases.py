"""Attention whose weights are looked at: inputs, what float64 makes of them, and the CUDA kernel in the emulator."""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecod_mcore.ops import attention_stats_reference
from tests.cuda_emulator.emulator import Emulator, garbage

THRESHOLDS = (1e-5, 1e-4, 1e-3, 1e-2)  # the paper's


@dataclass
class Case:
    """Arguments of attention_stats: q [B, H, T, D], k [B, H_kv, S, D], lse [B, H, T]."""

    q: Tensor
    k: Tensor
    lse: Tensor
    scale: float
    causal: bool = True
    thresholds: tuple[float, ...] = THRESHOLDS

    def apply(self, operator) -> tuple[Tensor, Tensor]:
        return operator(self.q, self.k, self.lse, self.scale, self.thresholds, self.causal)


def attention(q: Tensor, k: Tensor, causal: bool = True, **arguments) -> Case:
    """Complete a case by its log-sum-exp."""
    scale = q.shape[-1] ** -0.5
    scores = scale * (q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2))
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))
    return Case(q, k, lse, scale, causal, **arguments)


@dataclass
class Expected:
    """What float64 makes of a case, per head: entropy [B, H], counts [B, H, thresholds]."""

    entropy: Tensor
    condition: Tensor  # error of the entropy where products and log-sum-exp have the relative error 1
    fewest: Tensor  # counts, for rounding of the weights in float32
    most: Tensor


def oracle(case: Case) -> Expected:
    q, k, lse = case.q.double(), case.k.double(), case.lse.double()
    entropy, _ = attention_stats_reference(q, k, lse, case.scale, case.thresholds, case.causal)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    logs = case.scale * (q @ k) - lse[..., None]
    visible = torch.ones(logs.shape[-2:], dtype=torch.bool)
    if case.causal:
        visible = visible.tril(logs.shape[-1] - logs.shape[-2])
    magnitude = case.scale * (q.abs() @ k.abs()) + lse.abs()[..., None]
    condition = (logs.exp() * (1 + logs.abs()) * magnitude).where(visible, 0).sum((-1, -2))
    eps = torch.finfo(torch.promote_types(case.q.dtype, torch.float32)).eps
    slack = 8 * eps * (1 + magnitude)
    fewest, most = (
        torch.stack([((logs < math.log(t) + sign * slack) & visible).sum((-1, -2)) for t in case.thresholds], -1)
        for sign in (-1, 1)
    )
    return Expected(entropy, condition, fewest, most)


class Shape(ctypes.Structure):
    """AttentionShape of csrc/cuda/attention_stats.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "num_queries", "num_keys", "head_dim")),
        ("q_strides", ctypes.c_int64 * 3),
        ("k_strides", ctypes.c_int64 * 3),
        ("causal", ctypes.c_int32),
    )


def in_memory(x: Tensor) -> Tensor:
    """What lies in memory behind a permuted tensor, in its order."""
    order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
    return x.permute(order)


def emulated(case: Case, by: Emulator | None = None) -> tuple[Tensor, Tensor]:
    """attention_stats of the CUDA kernel; q and k may be permuted."""
    (batch, heads, queries, dim), kv_heads, keys = case.q.shape, case.k.shape[1], case.k.shape[2]
    strides = [(ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (case.q, case.k)]
    shape = Shape(batch, heads, kv_heads, queries, keys, dim, *strides, case.causal)
    emulator = by or Emulator()
    scratch_bytes = emulator.library.sparsecod_attention_stats_scratch
    scratch_bytes.restype = ctypes.c_int64
    scratch = garbage([scratch_bytes(ctypes.byref(shape))], torch.uint8)
    entropy = garbage([batch, heads], torch.float64)
    counts = garbage([batch, heads, len(case.thresholds)], torch.int64)
    arguments = (
        in_memory(case.q),
        in_memory(case.k),
        case.lse,
        case.q.dtype,
        ctypes.byref(shape),
        ctypes.c_double(case.scale),
        (ctypes.c_double * len(case.thresholds))(*case.thresholds),
        len(case.thresholds),
        scratch,
        entropy,
        counts,
    )
    entropy, counts, _ = emulator.launch("sparsecod_attention_stats", arguments, [entropy, counts, scratch])
    return entropy, counts
