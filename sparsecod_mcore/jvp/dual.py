"""Dual tensors: a value and its tangents, and what linear maps and collectives do to both."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


class Dual(NamedTuple):
    """A tensor [...] and P tangents of it, [P, ...]."""

    value: Tensor
    tangents: Tensor

    def map(self, linear: Callable[[Tensor], Tensor]) -> "Dual":
        """Apply a linear map that acts on trailing axes, and so on tangents as on the value."""
        return Dual(linear(self.value), linear(self.tangents))

    def to(self, dtype: torch.dtype) -> "Dual":
        return self.map(lambda x: x.to(dtype))

    def __add__(self, other: object) -> "Dual":
        assert isinstance(other, Dual)
        return Dual(self.value + other.value, self.tangents + other.tangents)


def project(x: Dual, weight: Tensor, bias: Tensor | None = None, *, value: Tensor | None = None) -> Dual:
    """x W^T + b over the last axis; `value` where the value of that is known."""
    weight = plain(weight)
    x = x.to(weight.dtype)
    if value is None:
        value = torch.nn.functional.linear(x.value, weight, bias)
    return Dual(value, torch.nn.functional.linear(x.tangents, weight))


def plain(weight: Tensor) -> Tensor:
    """A weight that is kept in FP8 as the tensor of its high-precision dtype; any other as it is."""
    return weight.dequantize() if hasattr(weight, "_quantizer") else weight


def gather_sequence(x: Dual, group: dist.ProcessGroup) -> Dual:
    """The sequence [S, ...] of all ranks of `group`, in the order of the ranks."""
    return _along_sequence(x, group, gather_from_sequence_parallel_region)


def reduce_scatter_sequence(x: Dual, group: dist.ProcessGroup) -> Dual:
    """The sum over the ranks of `group`, of which each keeps its part of the sequence [S, ...]."""
    return _along_sequence(x, group, reduce_scatter_to_sequence_parallel_region)


def _along_sequence(x: Dual, group: dist.ProcessGroup, collective: Callable[..., Tensor]) -> Dual:
    """One collective for value and tangents, which acts on their common axis S."""
    if group.size() == 1:
        return x
    packed_SP = torch.cat([x.value[None], x.tangents]).transpose(0, 1).contiguous()
    packed_PS = collective(packed_SP, group=group).transpose(0, 1)
    return Dual(packed_PS[0], packed_PS[1:])


def all_reduce(x: Dual, group: dist.ProcessGroup) -> Dual:
    """The sum over the ranks of `group`."""
    if group.size() == 1:
        return x
    packed_P = torch.cat([x.value[None], x.tangents])
    dist.all_reduce(packed_P, group=group)
    return Dual(packed_P[0], packed_P[1:])
