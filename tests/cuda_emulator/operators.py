"""Operators with the signatures of sparsecod_mcore.ops, by CUDA kernels in the emulator."""

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.cuda_emulator.emulator import DTYPES, Emulator, Scratch, garbage


@functools.cache
def emulator() -> Emulator:
    return Emulator()


def residual_add_moments(
    branch: Tensor,
    residual: Tensor,
    moments: Tensor,
    bias: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    by: Emulator | None = None,
) -> Tensor:
    """As sparsecod_mcore.ops.residual_add_moments, but for empty inputs, which do not reach a kernel."""
    by = by or emulator()
    output = garbage(branch.shape, branch.dtype)
    width = branch.shape[-1]
    rows = math.prod(branch.shape[:-1])
    scratch_bytes = ctypes.c_int64()
    failed = by.library.sparsecod_residual_add_moments_scratch(
        ctypes.c_int(DTYPES[branch.dtype]),
        ctypes.c_int64(rows),
        ctypes.c_int64(width),
        ctypes.c_bool(columns is not None),
        ctypes.byref(scratch_bytes),
    )
    assert not failed
    arguments = [branch.contiguous(), residual.contiguous(), None if bias is None else bias.contiguous(), output]
    arguments += [moments, columns, Scratch(scratch_bytes.value), branch.dtype, rows, width]
    results = [output, moments] if columns is None else [output, moments, columns]
    output, *sums = by.launch("sparsecod_residual_add_moments", arguments, results)
    for buffer, added in zip(results[1:], sums, strict=True):
        buffer.copy_(added)
    return output


def swiglu_jvp(gate_up: Tensor, gate_up_tangent: Tensor, *, by: Emulator | None = None) -> list[Tensor]:
    """As sparsecod_mcore.ops.swiglu_jvp, for gate_up [rows, 2 width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    results = [garbage((*x.shape[:-1], width), x.dtype) for x in (gate_up, gate_up_tangent)]
    sizes = (rows, width, gate_up_tangent.numel() // gate_up.numel())
    arguments = [gate_up, gate_up_tangent, *results, gate_up.dtype, *sizes]
    return (by or emulator()).launch("sparsecod_swiglu_jvp", arguments, results)


def rms_norm_jvp(
    x: Tensor, x_tangent: Tensor, weight: Tensor, eps: float, *, by: Emulator | None = None
) -> list[Tensor]:
    """As sparsecod_mcore.ops.rms_norm_jvp, for x [rows, width]."""
    results = [garbage(each.shape, x.dtype) for each in (x, x_tangent)]
    sizes = (*x.shape, x_tangent.numel() // x.numel())
    arguments = [x, x_tangent, weight, *results, x.dtype, weight.dtype, *sizes, eps]
    return (by or emulator()).launch("sparsecod_rms_norm_jvp", arguments, results)


def flash_attention_jvp(
    *tensors: Tensor,
    scale: float | None = None,
    causal: bool = True,
    order: tuple[int, int, int, int] = (0, 1, 2, 3),
    by: Emulator | None = None,
) -> list[Tensor]:
    """As sparsecod_mcore.ops.flash_attention_jvp, on tensors whose dimensions lie in memory in this order."""
    q, k, q_tangent = tensors[0], tensors[1], tensors[3]

    def permuted(x: Tensor, order: Sequence[int]) -> Tensor:  # but for probes, which stay in front
        return x.permute([i - 4 for i in order] if x.dim() == 4 else [0, *(i - 4 for i in order)])

    inverse = [order.index(i) for i in range(4)]
    results = [permuted(garbage(permuted(x, order).shape, x.dtype), inverse) for x in (q, q_tangent)]
    views = [permuted(permuted(x, order).contiguous(), inverse) for x in tensors] + results
    strides = torch.tensor([x.stride()[-4:-1] for x in views])
    probe_strides = torch.tensor([x.stride(0) for x in (*views[3:6], views[7])])
    stored = [permuted(x, order) for x in views]
    log_sum_exp = garbage(q.shape[:3], torch.float32)
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    probes = q_tangent.numel() // q.numel()
    scale = q.shape[3] ** -0.5 if scale is None else scale
    arguments = [*stored, log_sum_exp, q.dtype, *sizes, strides, probes, probe_strides, scale, causal]
    found = (by or emulator()).launch("sparsecod_flash_attention_jvp", arguments, [*stored[6:], log_sum_exp])
    return [permuted(found[0], inverse), permuted(found[1], inverse), found[2]]
