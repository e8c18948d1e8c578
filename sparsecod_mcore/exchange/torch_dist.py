"""Megatron's torch_dist format, tensor by tensor: no more than one is in memory, whatever the model's size.

The format is PyTorch's distributed checkpoint with a few conventions: layers and experts may be axes of one tensor,
what is no tensor is the bytes ``common_state``, and linear modules have an ``_extra_state``, which is empty here.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _write_item
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.exchange.hugging_face import DTYPES
from sparsecod_mcore.exchange.megatron import opening
from sparsecod_mcore.exchange.weights import Weight
from sparsecod_mcore.train.checkpoint_metadata import read_metadata

# How the tensors below are named; Megatron reads it to ask for the same names.
CONTENT = {"non_homogeneous_layers": True, "singleton_local_shards": False}
# What else may be there is the optimizer's and the random generators'.
_MODEL = ("embedding.", "decoder.", "output_layer.")


class CheckpointTensors:
    """The model's tensors in one checkpoint, of whatever parallel layout."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        metadata = read_metadata(checkpoint)
        self._tensors = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and key.startswith(_MODEL)
        }
        self._reader = dcp.FileSystemReader(checkpoint)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def check(self, weights: Iterable[Weight]) -> None:
        """Raise `UserError` unless the checkpoint holds just these, in their shapes and in a type that is read."""
        unused = {key for key in self._tensors if key.endswith((".weight", ".bias", "_weight"))}
        for weight in weights:
            if weight.names:
                self.dtype(weight)
                unused -= {key for name in weight.names for key in (name, _stacked(name)[0])}
        if unused:
            raise UserError(f"{self.checkpoint} has a tensor {min(unused)}, which its arguments do not account for")

    def dtype(self, weight: Weight) -> torch.dtype:
        """What `weight` is stored in. Raises `UserError` as `check` does."""
        key, index, stored = self._find(weight)
        lead, shape = tuple(stored.size[: len(index)]), tuple(stored.size[len(index) :])
        fits = shape == weight.shape
        if weight.padded:
            fits = shape[1:] == weight.shape[1:] and shape[0] >= weight.shape[0]
        if not fits or any(number >= count for number, count in zip(index, lead, strict=True)):
            raise UserError(
                f"{self.checkpoint}: {key} has the shape {list(stored.size)}, "
                f"its arguments imply {[*lead, *weight.shape]}"
            )
        if stored.properties.dtype not in DTYPES.values():
            raise UserError(f"{self.checkpoint}: {key} is {stored.properties.dtype}; {', '.join(DTYPES)} are read")
        return stored.properties.dtype

    def read(self, weight: Weight) -> torch.Tensor:
        """One whole tensor, without the rows that pad it; zeros for what Megatron does without."""
        if not weight.names:
            return torch.zeros(weight.shape)
        key, index, stored = self._find(weight)
        sizes = (*[1] * len(index), *weight.shape)
        whole = torch.empty(sizes, dtype=stored.properties.dtype)
        part = ChunkStorageMetadata(torch.Size((*index, *[0] * len(weight.shape))), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [part])
        if sum(item.lengths.numel() for item in items) != whole.numel():
            raise UserError(f"{self.checkpoint} does not hold all of {key}")
        with opening(self.checkpoint, key):
            self._reader.read_data(LoadPlan(items), _Into(whole)).wait()
        return whole.view(weight.shape)

    def _find(self, weight: Weight) -> tuple[str, tuple[int, ...], TensorStorageMetadata]:
        """Its key, and where in the tensor of that key it is: the layer, the expert."""
        expert = () if weight.expert is None else weight.expert[:1]
        for name in weight.names:
            for key, index in ((name, ()), _stacked(name)):
                if key in self._tensors:
                    return key, (*index, *expert), self._tensors[key]
        raise UserError(f"{self.checkpoint} lacks the tensor {weight.names[0]}")


def _stacked(name: str) -> tuple[str, tuple[int, ...]]:
    """Its name where all layers are one tensor, and which of them it is."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name, ()
    return ".".join((*parts[:2], *parts[3:])), (int(parts[2]),)


class _Into(DefaultLoadPlanner):
    """Has everything that is read put into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return narrow_tensor_by_index(self._target, read_item.dest_offsets, read_item.lengths)


def write_checkpoint(
    folder: Path,
    weights: Sequence[Weight],
    dtype: Callable[[Weight], torch.dtype],
    read: Callable[[Weight], torch.Tensor],
    common: dict[str, Any],
) -> None:
    """Write `weights`, each of which is asked of `read` when its turn comes, and `common`, what is no tensor.

    What `read` raises is raised.
    """
    planner = _Streamed(weights, dtype, read, common)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is wanted
            dcp.save({}, storage_writer=_OneByOne(folder), planner=planner, no_dist=True)
    except CheckpointException as error:  # an interrupt, too, arrives in one
        failed, _ = next(iter(error.failures.values()))
        raise failed from None
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _OneByOne(dcp.FileSystemWriter):
    """One file; upstream's writer keeps every tensor of a file until the file is complete."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in plan.items:
                content = planner.resolve_data(item)
                results.append(_write_item(self.transforms, stream, content, item, name, self.serialization_format))
                del content
            os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _Streamed(SavePlanner):
    """Has tensors made one by one, as they are written."""

    def __init__(
        self,
        weights: Sequence[Weight],
        dtype: Callable[[Weight], torch.dtype],
        read: Callable[[Weight], torch.Tensor],
        common: dict[str, Any],
    ) -> None:
        self._read = read
        self._weights: dict[MetadataIndex, Weight] = {}
        self._bytes: dict[MetadataIndex, list[Any]] = {}
        self._items: list[WriteItem] = []
        self._add_bytes("common_state", (0, 1), common)
        stateful: dict[tuple[str, tuple[int, int]], None] = {}
        for weight in weights:
            for name in weight.names:
                self._add_tensor(name, weight, dtype(weight))
            stateful |= dict.fromkeys(_stateful(weight))
        for name, place in stateful:
            self._add_bytes(f"{name}._extra_state", place, None)

    def _add_bytes(self, key: str, place: tuple[int, int], content: Any) -> None:
        index = MetadataIndex(ShardedObject(key, None, place[1:], place[:1]).unique_key)
        self._bytes[index] = [content]
        self._items.append(WriteItem(index, WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(nbytes=0)))

    def _add_tensor(self, key: str, weight: Weight, dtype: torch.dtype) -> None:
        offsets, sizes, total = [0] * len(weight.shape), weight.shape, weight.shape
        if weight.expert is not None:
            offsets, sizes, total = [weight.expert[0], *offsets], (1, *sizes), (weight.expert[1], *total)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        index = MetadataIndex(key, chunk.offsets)
        data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(total))
        self._weights[index] = weight
        self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """All that there is to write is known already."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save(self._bytes[write_item.index], content)
            return content
        assert write_item.tensor_data is not None
        tensor = self._read(self._weights[write_item.index]).view(write_item.tensor_data.chunk.sizes)
        # A part of a file would be written with all of the file.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _stateful(weight: Weight) -> Iterator[tuple[str, tuple[int, int]]]:
    """Modules of which Megatron asks an extra state, that come with `weight`; which one of how many they are."""
    place = weight.expert or (0, 1)
    for name in weight.names:
        module, _, parameter = name.rpartition(".")
        if module == "output_layer" or module.startswith("embedding"):
            continue
        if parameter == "weight" and not module.endswith("router"):
            yield module, place
        if module.endswith("self_attention.linear_proj"):
            yield module.removesuffix("linear_proj") + "core_attention", place
