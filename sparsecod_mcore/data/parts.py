"""Tokenizing a corpus in parallel, into parts that an interrupted run keeps.

A part holds the documents of a few megabytes of text, in order. Where a part begins depends on the corpus
alone, so the parts are the same for any number of workers, and a run that starts again makes the missing
ones only.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecod_mcore.data.atomic import publish, temporary
from sparsecod_mcore.data.documents import Corpus, Record, text_of
from sparsecod_mcore.data.parallel import ordered_map
from sparsecod_mcore.data.progress import Progress
from sparsecod_mcore.data.tokenizer import TextTokenizer

PART_BYTES = 4_000_000  # of undecoded text: seconds of work, so that workers finish together and little is lost


class Part(NamedTuple):
    """Tokenized documents, one after the other."""

    tokens_N: NDArray[np.integer]
    lengths_D: NDArray[np.int64]  # tokens of each document, its end-of-text token included
    hashes_D: NDArray[np.uint64]  # of each document's text
    empty_documents: int


class PartsSummary(NamedTuple):
    """What all parts of a corpus hold together."""

    documents: int
    empty_documents: int
    lowest_hash: int
    highest_hash: int


class _Task(NamedTuple):
    path: Path
    records: list[Record]


class _Done(NamedTuple):
    documents: int
    text_bytes: int
    fraction: float | None


def content_hash(text: str) -> int:
    """A 64-bit hash of a document's text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def tokenize_into_parts(corpus: Corpus, tokenizer: TextTokenizer, folder: Path, name: str, workers: int) -> list[Path]:
    """Tokenize every document of `corpus`; return the part files, ``folder/name-000000.npz`` on, in order."""
    paths: list[Path] = []

    def missing() -> Iterator[_Task]:
        for records in _batches(corpus.records()):
            paths.append(folder / f"{name}-{len(paths):06d}.npz")
            if paths[-1].exists():
                progress.skip(records[-1].fraction)
            else:
                yield _Task(paths[-1], records)

    with Progress(f"tokenizing {name}") as progress:
        for done in ordered_map(_make_part, missing(), workers, _set_tokenizer, (tokenizer,)):
            progress.advance(*done)
    return paths


def read_part(path: Path) -> Part:
    """Read a part file."""
    with np.load(path) as arrays:
        return Part(arrays["tokens"], arrays["lengths"], arrays["hashes"], int(arrays["empty_documents"]))


def summarize_parts(paths: Iterable[Path]) -> PartsSummary:
    """Count the documents of part files and find the range of their hashes."""
    documents = empty = 0
    lowest, highest = (1 << 64) - 1, 0
    for path in paths:
        with np.load(path) as arrays:
            hashes_D = arrays["hashes"]
            empty += int(arrays["empty_documents"])
        documents += len(hashes_D)
        lowest = min(lowest, int(hashes_D.min(initial=lowest)))
        highest = max(highest, int(hashes_D.max(initial=highest)))
    return PartsSummary(documents, empty, lowest, highest)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.raw)
        if size >= PART_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Set once per worker: handing it over with every task would cost more than small tasks do.
_tokenizer: TextTokenizer


def _set_tokenizer(tokenizer: TextTokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism


def _make_part(task: _Task) -> _Done:
    token_type = np.uint16 if _tokenizer.vocabulary_size <= 1 << 16 else np.int32
    documents: list[NDArray[np.integer]] = []
    hashes: list[int] = []
    text_bytes = empty = 0
    for record in task.records:
        text = text_of(record)
        if not text.strip():
            empty += 1
            continue
        text_bytes += len(text.encode("utf-8"))
        documents.append(np.array(_tokenizer.encode(text), dtype=token_type))
        hashes.append(content_hash(text))
    with temporary(task.path).open("wb") as file:
        np.savez(
            file,
            tokens=np.concatenate(documents) if documents else np.empty(0, token_type),
            lengths=np.array([len(document) for document in documents], dtype=np.int64),
            hashes=np.array(hashes, dtype=np.uint64),
            empty_documents=np.array(empty),
        )
    publish(task.path)
    return _Done(len(documents), text_bytes, task.records[-1].fraction)
