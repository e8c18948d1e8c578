"""Where figures come from: hashes of the model and of the tokens, and the versions of what computed them."""

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsecod_mcore import __version__


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, whatever folder they lie in and in whatever order they come."""
    total = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def hash_tokens(tokens_NT: npt.NDArray[np.integer]) -> str:
    """SHA-256 of sequences of tokens, whatever integers hold them."""
    digest = hashlib.sha256(f"{tokens_NT.shape}\n".encode())
    digest.update(np.ascontiguousarray(tokens_NT, dtype="<i8").data)
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of what figures depend on."""
    return {"sparsecod_mcore": __version__} | {name: version(name) for name in ("megatron-core", "torch")}
