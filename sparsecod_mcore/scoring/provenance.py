"""Where figures come from: hashes of the model and of the tokens, and the versions of what computed them."""

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sparsecod_mcore import __version__
from sparsecod_mcore.scoring.results import Dtype, Provenance


def provenance_of(
    model: str,
    model_files: Iterable[Path],
    data: str | None,
    tokens_NT: npt.NDArray[np.integer] | None,
    *,
    dtype: Dtype,
    device: torch.device,
    options: dict[str, str],
    seed: int | None = None,
) -> Provenance:
    """Of figures of `model`, which was read from `model_files`, on `tokens_NT` [N, T + 1], T of which are inputs."""
    return Provenance(
        model=model,
        model_sha256=hash_files(model_files),
        data=data,
        data_sha256=None if tokens_NT is None else hash_tokens(tokens_NT),
        tokens=None if tokens_NT is None else tokens_NT[:, 1:].size,
        dtype=dtype,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seed=seed,
        options=options,
        versions=package_versions(),
    )


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
