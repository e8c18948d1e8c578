"""PREFIX.json: what a pair of indexed splits was made from and what it holds."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsecod_mcore import __version__
from sparsecod_mcore.data.atomic import write_atomically
from sparsecod_mcore.errors import UserError

SCHEMA_VERSION = 1
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Split:
    """One .bin/.idx pair."""

    documents: int
    tokens: int
    max_token_id: int
    bytes: int  # of the .bin


@dataclass(frozen=True)
class Manifest:
    """The record of one preprocessing run. It is written last: where it is, the data is complete."""

    origin: dict[str, Any]  # sources, tokenizer and options: equal origins give equal bytes
    token_type: str
    empty_documents: int  # dropped, held-out sources included
    splits: dict[str, Split]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION


def split_prefix(output: str | Path, split: str) -> str:
    """Path of a split without its .bin or .idx."""
    return f"{output}_{split}"


def manifest_path(prefix: str | Path) -> Path:
    """Path of the manifest of an output prefix or of one of its splits."""
    prefix = str(prefix)
    for split in SPLITS:
        prefix = prefix.removesuffix(f"_{split}")
    return Path(f"{prefix}.json")


def package_versions() -> dict[str, str]:
    """Versions of what the bytes of the data depend on."""
    return {"sparsecod_mcore": __version__} | {name: version(name) for name in ("megatron-core", "numpy", "tokenizers")}


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest as JSON, in one step."""
    write_atomically(path, (json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n").encode())


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest; None where there is none. Raises `UserError` if the file is something else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not valid JSON ({error})") from None
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        found = content.get("schema_version") if isinstance(content, dict) else None
        raise UserError(f"{path} is no data manifest of schema {SCHEMA_VERSION} (its schema_version: {found})")
    try:
        splits = {name: Split(**split) for name, split in content.pop("splits").items()}
        return Manifest(splits=splits, **content)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: entries of a data manifest are missing or unknown") from None
