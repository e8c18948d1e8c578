"""What is timed of each operator: one entry each.

An entry makes inputs of a shape and lists ways to compute the same: ours, the composite in plain PyTorch, that
composite through torch.compile, and what else there is to be compared with. Peers that are not installed are left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsecod_mcore import ops

Shape = tuple[int, ...]
Inputs = tuple[Any, ...]
Call = Callable[..., Any]

OURS, EAGER, COMPILED = "ours", "PyTorch", "torch.compile"
BF16, FP32 = torch.bfloat16, torch.float32
THRESHOLDS = [1e-5, 1e-4, 1e-3, 1e-2]


@dataclass(frozen=True)
class Way:
    """A way to compute: call(*prepare(*inputs)), of which only the call is timed."""

    call: Call
    prepare: Callable[..., Inputs] = lambda *inputs: inputs


@dataclass(frozen=True)
class Benchmark:
    """An operator's inputs, the work that it cannot avoid, and other ways than its own."""

    operator: str
    inputs: Callable[[Shape, torch.dtype, str], Inputs]
    work: Callable[[Shape, torch.dtype], float]  # bytes that must move, or floating-point operations
    cuda_shapes: tuple[Shape, ...]
    cpu_shapes: tuple[Shape, ...]
    cuda_dtypes: tuple[torch.dtype, ...] = (BF16,)
    cpu_dtypes: tuple[torch.dtype, ...] = (FP32,)
    in_flops: bool = False
    others: Callable[[str], dict[str, Way]] = field(default=lambda device: {})
    adapt: Callable[[Call], Call] = lambda function: function  # from the inputs to the operator's arguments

    def ways(self, device: str, compiled: bool) -> dict[str, Way]:
        """Return ours first, then the composite, then others."""
        composite = self.adapt(getattr(ops, f"{self.operator}_reference"))
        ways = {OURS: Way(self.adapt(getattr(ops, self.operator))), EAGER: Way(composite)}
        if compiled:
            ways[COMPILED] = Way(torch.compile(composite, dynamic=False))
        return ways | self.others(device)


def random(shape: Shape, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def nbytes(dtype: torch.dtype, elements: int) -> float:
    return float(dtype.itemsize * elements)


# residual_add_moments


def add_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    moments = torch.zeros(ops.NUM_MOMENTS, dtype=torch.float64, device=device)
    columns = torch.zeros(ops.NUM_COLUMN_SUMS, shape[1], dtype=torch.float64, device=device)
    return random(shape, dtype, device), random(shape, dtype, device), moments, columns


def add_others(device: str) -> dict[str, Way]:
    def with_columns(branch: Tensor, residual: Tensor, moments: Tensor, columns: Tensor) -> Tensor:
        return ops.residual_add_moments(branch, residual, moments, None, columns)

    ways = {"plain add": Way(lambda branch, residual, *_: branch + residual), "ours, with columns": Way(with_columns)}
    fused = liger_fused_add_rms_norm() if device == "cuda" else None
    if fused is not None:

        def prepare(branch: Tensor, residual: Tensor, *_: Tensor) -> Inputs:
            return branch, residual, torch.ones(branch.shape[-1], dtype=branch.dtype, device=branch.device), 1e-6

        ways["Liger's fused add + RMSNorm"] = Way(fused, prepare)
    return ways


@cache
def liger_fused_add_rms_norm() -> Call | None:
    """Return Liger Kernel's (branch, residual, weight, eps) -> (normed, sum), if it is installed. It writes both."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError:
        return None
    return LigerFusedAddRMSNormFunction.apply


# attention


def attention_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    batch, heads, kv_heads, tokens, width = shape
    return tuple(random((batch, h, tokens, width), dtype, device) for h in 2 * (heads, kv_heads, kv_heads))


def matmul_flops(shape: Shape) -> float:
    """Operations of one product over the visible half of the scores, or of the weights with the values."""
    batch, heads, _, tokens, width = shape
    return float(batch * heads * tokens * tokens * width)


def attention_others(device: str) -> dict[str, Way]:
    peer = jvp_flash_attention() if device == "cuda" else None
    return {} if peer is None else {"jvp-flash-attention": Way(peer, as_many_key_heads)}


def as_many_key_heads(q: Tensor, *others: Tensor) -> Inputs:
    """Repeat keys and values for a peer that knows no groups."""
    return q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in others)


@cache
def jvp_flash_attention() -> Call | None:
    """Return the package's attention with tangents, (q, k, v, tangents) -> (o, o_tangent), if it is installed."""
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except ImportError:
        return None

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            q, k, v = (forward_ad.make_dual(*pair) for pair in zip(inputs[:3], inputs[3:], strict=True))
            return forward_ad.unpack_dual(JVPAttn.fwd_dual(q, k, v, causal=True))

    return attend


def stats_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    q, k, *_ = attention_inputs(shape, dtype, device)
    scale, group = q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    lse = torch.empty(q.shape[:-1], device=device)
    hidden_TT = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=device).triu(1)
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):  # one at a time, for memory's sake
            scores_TT = scale * q[batch, head].float() @ k[batch, head // group].float().T
            lse[batch, head] = scores_TT.masked_fill_(hidden_TT, -torch.inf).logsumexp(-1)
    return q, k, lse, scale, THRESHOLDS


def stats_others(device: str) -> dict[str, Way]:
    def forward(q: Tensor, k: Tensor, *_: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    return {"flash-attention forward": Way(forward)} if device == "cuda" else {}


# probe_moments, count_below


def probe_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    probes, _, width = shape
    sums = torch.zeros(probes, width, dtype=torch.float64, device=device)
    moments = torch.zeros(probes, ops.NUM_PROBE_MOMENTS, dtype=torch.float64, device=device)
    return random((probes, width), dtype, device), random(shape, dtype, device), sums, moments


def parameters(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Weights of layers of a width: per layer attention, MLP and two norms."""
    layers, width = shape
    sizes: list[Shape] = [(width, width)] * 4 + [(3 * width, width)] * 3 + [(width,)] * 2
    return ([0.02 * random(size, dtype, device) for _ in range(layers) for size in sizes],)


def count(function: Call) -> Call:
    return lambda tensors: function(tensors, THRESHOLDS)


def add(function: Call) -> Call:
    return lambda branch, residual, moments, _: function(branch, residual, moments)


ROWS = ((4096, 1024), (8192, 2048), (8192, 4096), (16384, 8192))
CPU_ROWS = ((1024, 192), (4096, 1024), (2048, 4096))

BENCHMARKS = (
    Benchmark(
        "residual_add_moments",
        add_inputs,
        lambda shape, dtype: nbytes(dtype, 3 * math.prod(shape)),
        ROWS,
        CPU_ROWS,
        cuda_dtypes=(BF16, FP32),
        cpu_dtypes=(BF16, FP32),
        others=add_others,
        adapt=add,
    ),
    Benchmark(
        "rms_norm_jvp",
        lambda shape, dtype, device: (
            *(random(shape, dtype, device) for _ in range(2)),
            random(shape[1:], dtype, device),
            1e-5,
        ),
        lambda shape, dtype: nbytes(dtype, 4 * math.prod(shape)),
        ROWS,
        CPU_ROWS,
    ),
    Benchmark(
        "swiglu_jvp",
        lambda shape, dtype, device: tuple(random((shape[0], 2 * shape[1]), dtype, device) for _ in range(2)),
        lambda shape, dtype: nbytes(dtype, 6 * math.prod(shape)),
        ROWS,
        CPU_ROWS,
    ),
    Benchmark(
        "flash_attention_jvp",
        attention_inputs,
        lambda shape, dtype: 6 * matmul_flops(shape),
        ((1, 16, 16, 4096, 128), (1, 32, 8, 4096, 128), (2, 16, 4, 2048, 64)),
        ((1, 8, 2, 512, 64),),
        in_flops=True,
        others=attention_others,
    ),
    Benchmark(
        "attention_stats",
        stats_inputs,
        lambda shape, dtype: matmul_flops(shape),
        ((1, 16, 4, 2048, 128), (1, 16, 4, 8192, 128)),
        ((1, 8, 8, 2048, 64),),
        in_flops=True,
        others=stats_others,
    ),
    Benchmark(
        "probe_moments",
        probe_inputs,
        lambda shape, dtype: nbytes(dtype, math.prod(shape)),
        ((1, 8192, 4096), (4, 8192, 4096)),
        ((1, 4096, 1024),),
    ),
    Benchmark(
        "count_below",
        parameters,
        lambda shape, dtype: nbytes(dtype, shape[0] * (13 * shape[1] ** 2 + 2 * shape[1])),
        ((8, 4096), (12, 768)),
        ((4, 512),),
        adapt=count,
    ),
)
