"""Megatron's indexed files: PREFIX.bin holds the tokens, PREFIX.idx where each document begins.

Reading the header takes no Megatron, so that a broken file is found, and named in a sentence, before a job
starts.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsecod_mcore.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, entries of the document index
_VERSION = 1
# Megatron's codes (`DType`) of the types that can hold tokens.
_TOKEN_TYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True)
class IndexedFile:
    """What the header of an indexed file says."""

    bin_path: Path
    token_type: type[np.integer]
    documents: int
    tokens: int

    def chunks(self) -> Iterator[NDArray[np.integer]]:
        """Yield all tokens in order, some millions at a time."""
        with self.bin_path.open("rb") as file:
            while len(tokens_N := np.fromfile(file, dtype=self.token_type, count=_CHUNK_TOKENS)):
                yield tokens_N


def check_dataset(prefix: str | Path) -> IndexedFile:
    """Check ``prefix.bin`` and ``prefix.idx`` against each other without reading the tokens.

    Raises `UserError`, naming the file, if one is missing, the .idx has no Megatron header, is cut short or
    too long, the .bin has not the size that the .idx states, or there are no documents.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path, other in ((idx_path, bin_path), (bin_path, idx_path)):
        if not path.is_file():
            kept = f" although {other.name} does" if other.is_file() else ""
            raise UserError(f"{path} does not exist{kept}; tools/preprocess_data.py makes it")
    token_type, sequences, entries = _read_header(idx_path)
    if sequences == 0 or entries < 2:
        raise UserError(f"{idx_path} holds no documents, so there is nothing to train on")
    # Behind the header lie, unaligned: lengths (int32), byte offsets (int64), document index (int64).
    index_bytes = np.memmap(idx_path, dtype=np.uint8, mode="r")[_HEADER.size :]
    last_length = int(index_bytes[4 * (sequences - 1) : 4 * sequences].view(np.int32)[0])
    last_offset = int(index_bytes[12 * sequences - 8 : 12 * sequences].view(np.int64)[0])
    last_document = int(index_bytes[12 * sequences + 8 * (entries - 1) :][:8].view(np.int64)[0])
    if last_length < 0 or last_offset < 0 or last_document != sequences:
        raise UserError(f"{idx_path} is damaged: its last document does not end at its last sequence")
    token_bytes = np.dtype(token_type).itemsize
    expected = last_offset + last_length * token_bytes
    if expected == 0:
        raise UserError(f"{idx_path} holds no tokens, so there is nothing to train on")
    found = bin_path.stat().st_size
    if found != expected:
        difference = "cut short" if found < expected else "too long"
        raise UserError(f"{bin_path} is {difference}: it has {found} bytes, but its .idx states {expected}")
    return IndexedFile(bin_path, token_type, entries - 1, expected // token_bytes)


def _read_header(idx_path: Path) -> tuple[type[np.integer], int, int]:
    size = idx_path.stat().st_size
    with idx_path.open("rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise UserError(f"{idx_path} is no index of a Megatron dataset: it does not begin with {_MAGIC[:7].decode()}")
    if size < _HEADER.size:
        raise UserError(f"{idx_path} is cut short: it has {size} bytes, fewer than its header")
    _, version, code, sequences, entries = _HEADER.unpack(header)
    if version != _VERSION or code not in _TOKEN_TYPES:
        raise UserError(
            f"{idx_path} has version {version} and type code {code}; version {_VERSION} "
            f"and the codes of whole numbers ({', '.join(map(str, _TOKEN_TYPES))}) are accepted"
        )
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if size != expected:
        difference = "cut short" if size < expected else "too long"
        raise UserError(f"{idx_path} is {difference}: it has {size} bytes, but its header states {expected}")
    return _TOKEN_TYPES[code], sequences, entries
