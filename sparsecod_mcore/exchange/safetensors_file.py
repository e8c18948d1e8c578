"""Sharded safetensors, written tensor by tensor; the library's own writer wants a whole file's tensors in memory.

A file is the length of its header (8 bytes, little endian), the header (JSON: type, shape and place of each tensor),
and the tensors' bytes, without gaps.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsecod_mcore.exchange.hugging_face import DTYPES
from sparsecod_mcore.exchange.weights import Shape

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Group:
    """Tensors that are made, and therefore written, together."""

    shapes: dict[str, Shape]
    dtype: torch.dtype
    make: Callable[[], Sequence[torch.Tensor]]

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(map(self.size_of, self.shapes))

    def size_of(self, name: str) -> int:
        """Bytes of one."""
        return torch.Size(self.shapes[name]).numel() * self.dtype.itemsize


def write_sharded(folder: Path, groups: Iterable[Group], max_shard_size: int) -> None:
    """Write ``model.safetensors``, or several files of at most `max_shard_size` bytes (unless a group is larger)."""
    shards: list[list[Group]] = [[]]
    for group in groups:
        if shards[-1] and sum(other.size for other in shards[-1]) + group.size > max_shard_size:
            shards.append([])
        shards[-1].append(group)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Larger elements first: every tensor then begins at a multiple of the size of its elements.
        _write(folder / file, sorted(shard, key=lambda group: -group.dtype.itemsize))
        weight_map |= {name: file for group in shard for name in group.shapes}
    if len(shards) > 1:
        total = sum(group.size for shard in shards for group in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write(path: Path, groups: Sequence[Group]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for group in groups:
        for name, shape in group.shapes.items():
            begin, end = end, end + group.size_of(name)
            header[name] = {"dtype": _NAMES[group.dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for group in groups:
            for (name, shape), tensor in zip(group.shapes.items(), group.make(), strict=True):
                assert tuple(tensor.shape) == shape and tensor.dtype == group.dtype, name
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
