"""Kinds of GPUs that runs are planned for."""

from dataclasses import dataclass

from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.train.hardware import PEAK_BF16_FLOPS

# Device memory in GB (1e9 bytes), from the vendor's data sheets. One node has eight, but for GB200's four.
_MEMORY = {"A100": 80, "H100 PCIe": 80, "H100": 80, "H200": 141, "B200": 180, "GB200": 186}
_PER_NODE = {"GB200": 4}


@dataclass(frozen=True)
class Gpu:
    kind: str
    memory: float  # bytes
    peak: float  # dense bfloat16 FLOP/s
    per_node: int


def gpu_of(kind: str) -> Gpu:
    """The kind of that name, in any case. Raises `UserError` for one that is not known."""
    names = {name.casefold(): name for name in _MEMORY}
    name = names.get(kind.casefold())
    if name is None:
        raise UserError(f"GPU kind {kind} is given, one of {', '.join(_MEMORY)} is accepted{nearest(kind, _MEMORY)}")
    return Gpu(name, _MEMORY[name] * 1e9, PEAK_BF16_FLOPS[name], _PER_NODE.get(name, 8))
