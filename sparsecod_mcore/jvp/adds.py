"""Forward-mode rules of residual adds: what reaches the stream of what a branch puts out."""

from functools import singledispatch

import torch
from torch import Tensor

from sparsecod_mcore.jvp.dual import Dual
from sparsecod_mcore.jvp.rules import jvp, jvp_with_sums, summed, unknown
from sparsecod_mcore.model.residual import MeasuredResidualAdd
from sparsecod_mcore.model.residual_norms import BranchNormResidualAdd, PostNormResidualAdd


@singledispatch
def added(add: torch.nn.Module, branch: Dual, stream: Dual) -> Dual:
    """By how much the stream [S, B, D] is another behind the add of `branch` [S, B, D]."""
    raise unknown(add)


@added.register
def _(add: MeasuredResidualAdd, branch: Dual, stream: Dual) -> Dual:
    return branch


@added.register
def _(add: BranchNormResidualAdd, branch: Dual, stream: Dual) -> Dual:
    return jvp(add.norm, branch)


@added.register
def _(add: PostNormResidualAdd, branch: Dual, stream: Dual) -> Dual:
    y = jvp(add.norm, stream.map(lambda t: add.alpha * t) + branch)
    return y + stream.map(torch.neg)


def added_with_sums(
    add: torch.nn.Module, module: torch.nn.Module, x: Dual, stream: Dual, num_summed: int
) -> tuple[Tensor, Tensor]:
    """As `jvp_with_sums` of what `add` adds of the output of `module` for x.

    Sums are taken before the module's last projection only where what is behind it is linear.
    """
    if type(add) is MeasuredResidualAdd:
        return jvp_with_sums(module, x, num_summed)
    return summed(added(add, jvp(module, x).to(stream.value.dtype), stream), num_summed)
