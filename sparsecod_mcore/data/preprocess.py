"""From a corpus to PREFIX_train and PREFIX_valid (.bin/.idx) and their manifest PREFIX.json."""

import json
import shutil
from pathlib import Path
from typing import Any

from sparsecod_mcore.data.atomic import make_folder, temporary, write_atomically
from sparsecod_mcore.data.documents import Corpus
from sparsecod_mcore.data.indexed import check_dataset
from sparsecod_mcore.data.manifest import (
    SPLITS,
    Manifest,
    manifest_path,
    package_versions,
    read_manifest,
    split_prefix,
    write_manifest,
)
from sparsecod_mcore.data.parallel import available_cores
from sparsecod_mcore.data.parts import summarize_parts, tokenize_into_parts
from sparsecod_mcore.data.split import check_fraction, cut, deal, held_out_below
from sparsecod_mcore.data.tokenizer import TextTokenizer, load_tokenizer
from sparsecod_mcore.data.writer import SplitWriter
from sparsecod_mcore.errors import UserError

DEFAULT_VALID_FRACTION = 0.02


def preprocess(
    corpus: Corpus,
    output: str | Path,
    tokenizer_path: str | Path,
    *,
    valid_corpus: Corpus | None = None,
    valid_fraction: float = DEFAULT_VALID_FRACTION,
    eos_token: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Tokenize `corpus` into Megatron's indexed format, an end-of-text token behind every document.

    Documents are held out by the hash of their text (`valid_fraction` of them; at least one on each side;
    of a corpus of a single document its last tokens), unless `valid_corpus` is given, or the fraction is 0
    and there is no PREFIX_valid. The bytes depend on corpus, tokenizer and these options alone. A run that
    was interrupted goes on where it stopped; one that is complete is left as it is. Until it is complete it
    needs its size on disk twice.

    Raises `UserError` for bad input, and where `output` holds data of another origin and `overwrite` is not
    set.
    """
    check_fraction(valid_fraction)
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"{workers} workers were asked for, but there has to be at least 1")
    tokenizer = load_tokenizer(tokenizer_path, eos_token)
    origin = {
        "sources": corpus.identity(),
        "valid_sources": valid_corpus.identity() if valid_corpus else None,
        "valid_fraction": None if valid_corpus else valid_fraction,
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocabulary_size": tokenizer.vocabulary_size,
            "eos_token": tokenizer.eos_token,
            "eos_id": tokenizer.eos_id,
        },
    }
    output = str(output)
    make_folder(Path(output).parent)
    parts_folder = Path(f"{output}.parts")
    if not overwrite and (complete := _complete(output, parts_folder, origin)):
        print(f"{output}: already complete")
        return complete
    _prepare_parts_folder(parts_folder, origin)
    train_parts = tokenize_into_parts(corpus, tokenizer, parts_folder, "train", workers)
    valid_parts = None
    if valid_corpus:
        valid_parts = tokenize_into_parts(valid_corpus, tokenizer, parts_folder, "valid", workers)
    manifest = _write_splits(output, train_parts, valid_parts, valid_fraction, tokenizer, origin)
    shutil.rmtree(parts_folder)
    for name, split in manifest.splits.items():
        print(f"{split_prefix(output, name)}: {split.documents:,} documents, {split.tokens:,} tokens")
    if manifest.empty_documents:
        print(f"{manifest.empty_documents:,} documents without text were left out")
    return manifest


def _complete(output: str, parts_folder: Path, origin: dict[str, Any]) -> Manifest | None:
    """The manifest of data that is there already; None where there is work to do."""
    manifest = read_manifest(manifest_path(output))
    if manifest is None:
        present = [name for name in _data_files(output) if Path(name).exists()]
        if present and _origin_of_parts(parts_folder) != origin:
            raise UserError(f"{present[0]} exists and nothing says what it was made from; --overwrite replaces it")
        return None
    if manifest.origin != origin:
        different = ", ".join(key for key in origin if manifest.origin.get(key) != origin[key])
        raise UserError(
            f"{output} was made from something else (what differs: {different}); "
            "choose another --output, or --overwrite to replace it"
        )
    try:
        for name, split in manifest.splits.items():
            if check_dataset(split_prefix(output, name)).tokens != split.tokens:
                raise UserError(f"{split_prefix(output, name)}.bin is not the file that {output}.json describes")
    except UserError as error:
        print(f"{error}: making it again")
        return None
    if _origin_of_parts(parts_folder) == origin:
        shutil.rmtree(parts_folder)
    return manifest


def _data_files(output: str) -> list[str]:
    return [f"{split_prefix(output, split)}.{suffix}" for split in SPLITS for suffix in ("bin", "idx")]


def _origin_file(parts_folder: Path) -> Path:
    return parts_folder / "origin.json"


def _origin_of_parts(parts_folder: Path) -> Any:
    try:
        return json.loads(_origin_file(parts_folder).read_bytes())
    except FileNotFoundError:
        return None


def _prepare_parts_folder(folder: Path, origin: dict[str, Any]) -> None:
    found = _origin_of_parts(folder)
    if found == origin:
        print(f"going on with the unfinished work in {folder}")
        return
    if found is not None:
        print(f"removing {folder}, unfinished work on something else")
        shutil.rmtree(folder)
    temporary(_origin_file(folder)).unlink(missing_ok=True)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is needed for unfinished work, but holds something else: remove or rename it")
    make_folder(folder)
    write_atomically(_origin_file(folder), json.dumps(origin, indent=2).encode())


def _write_splits(
    output: str,
    train_parts: list[Path],
    valid_parts: list[Path] | None,
    valid_fraction: float,
    tokenizer: TextTokenizer,
    origin: dict[str, Any],
) -> Manifest:
    found = summarize_parts(train_parts)
    found_valid = summarize_parts(valid_parts or [])
    if not found.documents:
        raise UserError("the corpus has no document with text")
    if valid_parts is not None and not found_valid.documents:
        raise UserError("the held-out data has no document with text")
    # Of a single document the end is held out instead.
    threshold = 0
    if valid_parts is None and found.documents > 1:
        threshold = held_out_below(found, valid_fraction)
    names = SPLITS if valid_parts is not None or valid_fraction > 0 else SPLITS[:1]
    writers = {name: SplitWriter(split_prefix(output, name), tokenizer.vocabulary_size) for name in names}
    train, valid = writers["train"], writers.get("valid")
    if valid and valid_parts is None and found.documents == 1:
        cut(train_parts, valid_fraction, tokenizer.eos_id, valid, train)
        print(f"the corpus is one document: its last {valid_fraction:.1%} of tokens are held out")
    else:
        deal(train_parts, threshold, valid, train)
    if valid and valid_parts is not None:
        deal(valid_parts, 0, None, valid)
    manifest = Manifest(
        origin=origin,
        token_type=train.token_type.__name__,
        empty_documents=found.empty_documents + found_valid.empty_documents,
        splits={name: writer.close() for name, writer in writers.items()},
        versions=package_versions(),
    )
    # From here on the old data goes; without a manifest nobody takes what is there for complete.
    manifest_path(output).unlink(missing_ok=True)
    for name in _data_files(output):
        Path(name).unlink(missing_ok=True)
    for writer in writers.values():
        writer.publish()
    write_manifest(manifest_path(output), manifest)
    return manifest
