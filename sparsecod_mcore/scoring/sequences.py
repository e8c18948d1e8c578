"""The sequences that a model is scored on: tokens [N, T + 1], of which T are inputs and the last T targets."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from sparsecod_mcore.data import check_dataset, split_prefix
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.scoring.stack import Stack

DEFAULT_SEQUENCES = 64  # of a dataset; a .npy file is used whole


def load_sequences(path: str, sequences: int | None = None, length: int | None = None) -> NDArray[np.int64]:
    """Tokens [N, T + 1] of a .npy file, or of a dataset's held-out part cut into sequences one after the other.

    `path` is a file, or a prefix that tools/preprocess_data.py made. `sequences` takes the first N, `length` is T.
    Raises `UserError` if it is neither, or there are fewer.
    """
    for name, value in (("sequences", sequences), ("length", length)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is given, 1 or more is accepted")
    if path.endswith(".npy"):
        tokens_NT = _of_npy(Path(path))
        if length is not None:
            tokens_NT = tokens_NT[:, : length + 1]
    else:
        tokens_NT = _of_dataset(path, sequences, length)
    found, width = tokens_NT.shape[0], tokens_NT.shape[1] - 1
    if found < (sequences or found) or width < (length or width):
        raise UserError(
            f"{path} has {found} sequences of length {width}, fewer or shorter than the {sequences or found} of length "
            f"{length or width} asked for"
        )
    return tokens_NT[:sequences].astype(np.int64)


def _of_npy(path: Path) -> NDArray[np.integer]:
    try:
        tokens_NT = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError, BadZipFile):
        tokens_NT = None
    if not isinstance(tokens_NT, np.ndarray):  # a .npz is a folder of arrays, whatever its name
        raise UserError(f"{path} is no .npy file of numbers")
    if tokens_NT.ndim != 2 or not np.issubdtype(tokens_NT.dtype, np.integer) or 0 in tokens_NT.shape:
        raise UserError(
            f"{path} holds {tokens_NT.dtype} {list(tokens_NT.shape)}; integers [sequences, length + 1] are wanted"
        )
    if tokens_NT.shape[1] < 2:
        raise UserError(f"{path} has sequences of one token, which predict nothing")
    return tokens_NT


def _of_dataset(prefix: str, sequences: int | None, length: int | None) -> NDArray[np.integer]:
    if Path(prefix).is_dir():
        raise UserError(f"{prefix} is a folder; a .npy file or the prefix of tools/preprocess_data.py is wanted")
    if length is None:
        raise UserError(f"--length is needed to cut {prefix} into sequences")
    held_out = split_prefix(prefix, "valid")
    file = check_dataset(held_out if Path(f"{held_out}.idx").exists() else prefix)
    tokens_N = np.memmap(file.bin_path, dtype=file.token_type, mode="r")
    count = min(sequences or DEFAULT_SEQUENCES, (len(tokens_N) - 1) // length)
    if count < 1:
        raise UserError(f"{file.bin_path} has {len(tokens_N)} tokens, fewer than one sequence of length {length} needs")
    # Neighbours share a token: the last target of one is the first input of the next.
    return np.stack([tokens_N[i * length : (i + 1) * length + 1] for i in range(count)])


def check_sequences(tokens_NT: NDArray[np.int64], stack: Stack, path: str) -> torch.Tensor:
    """`tokens_NT` as a tensor. Raises `UserError` for what the model has no embedding or position for."""
    low, high = int(tokens_NT.min()), int(tokens_NT.max())
    if low < 0 or high >= stack.vocab_size:
        outside = low if low < 0 else high
        raise UserError(f"{path} holds the token {outside}, outside of the model's vocabulary of {stack.vocab_size}")
    length = tokens_NT.shape[1] - 1
    if length > stack.max_positions:
        raise UserError(
            f"{path} has sequences of length {length}, longer than the model's {stack.max_positions} positions; "
            "--length cuts them"
        )
    return torch.from_numpy(tokens_NT)
