"""Which documents are held out, by the hash of their text, and dealing them out to the splits."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sparsecod_mcore.data.parts import PartsSummary, read_part
from sparsecod_mcore.data.writer import SplitWriter
from sparsecod_mcore.errors import UserError

_HASHES = 1 << 64


def check_fraction(fraction: float) -> None:
    """Raise `UserError` unless `fraction` can be a held-out share."""
    if not 0 <= fraction < 1 or math.isnan(fraction):
        raise UserError(f"the held-out fraction is {fraction}, but it has to be at least 0 and below 1")


def held_out_below(parts: PartsSummary, fraction: float) -> int:
    """The threshold t for which the documents with ``hash < t`` are held out, about `fraction` of them.

    It is ``fraction * 2**64``, so that a document falls on the same side in every corpus, moved just as far
    as it takes to leave a document on each side; 0 for a fraction of 0. Raises `UserError` where all
    documents are one text.
    """
    if fraction == 0:
        return 0
    if parts.lowest_hash == parts.highest_hash:
        raise UserError(
            f"all {parts.documents} documents are the same text, so that none can be held out; "
            "name held-out data with --valid-input or choose --valid-fraction 0"
        )
    return min(max(round(fraction * _HASHES), parts.lowest_hash + 1), parts.highest_hash)


def deal(parts: Iterable[Path], threshold: int, below: SplitWriter | None, rest: SplitWriter) -> None:
    """Write the documents of `parts`, in order, to `below` (a hash below `threshold`) or `rest`."""
    for path in parts:
        part = read_part(path)
        if not len(part.lengths_D):
            continue
        documents = np.split(part.tokens_N, np.cumsum(part.lengths_D)[:-1])
        is_below_D = part.hashes_D < np.uint64(threshold)
        for tokens_N, is_below in zip(documents, is_below_D.tolist(), strict=True):
            writer = below if is_below else rest
            assert writer is not None
            writer.add(tokens_N)


def cut(parts: Iterable[Path], fraction: float, eos_id: int, tail: SplitWriter, rest: SplitWriter) -> None:
    """Cut the only document of `parts`: its last `fraction` of tokens to `tail`, the others to `rest`.

    Raises `UserError` if it has fewer than two tokens.
    """
    tokens_N = np.concatenate([read_part(path).tokens_N for path in parts])[:-1]
    if len(tokens_N) < 2:
        raise UserError("the corpus is a single document of one token, of which nothing can be held out")
    cut_at = len(tokens_N) - min(max(round(fraction * len(tokens_N)), 1), len(tokens_N) - 1)
    for writer, piece_N in ((rest, tokens_N[:cut_at]), (tail, tokens_N[cut_at:])):
        writer.add(np.append(piece_N, tokens_N.dtype.type(eos_id)))
