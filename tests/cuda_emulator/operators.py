"""Operators with the signatures of sparsecod_mcore.ops, by CUDA kernels in the emulator."""

import ctypes
import functools
import math

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
