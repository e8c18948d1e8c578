"""Where a torch_dist checkpoint keeps its tensors: ``.metadata``, a pickle, read without trusting it."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from sparsecod_mcore.errors import UserError

_DCP = "torch.distributed.checkpoint"
_NEEDED = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}


class _Foreign(Exception):
    """Something that no metadata needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _NEEDED:
            raise _Foreign(f"{module}.{name}")
        return super().find_class(module, name)


def read_metadata(checkpoint: Path) -> Metadata:
    """Unpickle ``.metadata``, making nothing but what such a file consists of.

    Raises `UserError` if it asks for anything else, which could run code, or is damaged.
    """
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except _Foreign as error:
        raise UserError(f"{path} is refused: it wants {error}, which no checkpoint's metadata needs") from None
    except Exception as error:  # damaged pickles fail in any way
        raise UserError(f"{path} is not readable ({type(error).__name__})") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path} is not readable (it holds {type(metadata).__name__})")
    return metadata
