"""What the tokens of an indexed file say about its vocabulary."""

import math
from itertools import islice
from pathlib import Path

import numpy as np

from sparsecod_mcore.data.indexed import check_dataset
from sparsecod_mcore.data.manifest import manifest_path, read_manifest
from sparsecod_mcore.data.tokenizer import load_tokenizer
from sparsecod_mcore.errors import UserError

MOST_CHUNKS = 64


def check_vocabulary(prefix: str | Path, tokenizer_path: str | Path, eos_token: str | None = None) -> None:
    """Check that the data at `prefix` (one split) can be trained on with a tokenizer.

    Raises `UserError` if the data's manifest names another tokenizer, or, for data without one, if a token
    lies outside the vocabulary (which reads up to a billion of them). For `eos_token` see `load_tokenizer`.
    """
    tokenizer = load_tokenizer(tokenizer_path, eos_token)
    manifest = read_manifest(manifest_path(prefix))
    if manifest is not None:
        used = manifest.origin["tokenizer"]
        if used["sha256"] != tokenizer.sha256:
            raise UserError(
                f"{prefix}.bin was made with a tokenizer of {used['vocabulary_size']} tokens "
                f"(sha256 {used['sha256'][:12]}…), but {tokenizer_path} is another, "
                f"of {tokenizer.vocabulary_size} tokens (sha256 {tokenizer.sha256[:12]}…)"
            )
        return
    chunks = islice(check_dataset(prefix).chunks(), MOST_CHUNKS)
    largest = max(int(tokens_N.max()) for tokens_N in chunks)
    if largest >= tokenizer.vocabulary_size:
        raise UserError(
            f"{prefix}.bin holds token {largest}, but the vocabulary of {tokenizer_path} "
            f"ends at {tokenizer.vocabulary_size - 1}: the data was made with another tokenizer"
        )


def unigram_perplexity(prefix: str | Path) -> float:
    """exp of the entropy (natural log) of the frequencies of the tokens at `prefix` (one split).

    It is the perplexity on these tokens of the best model that ignores context.
    """
    counts_V = np.zeros(0, dtype=np.int64)
    for tokens_N in check_dataset(prefix).chunks():
        chunk_V = np.bincount(tokens_N, minlength=len(counts_V))
        chunk_V[: len(counts_V)] += counts_V
        counts_V = chunk_V
    p_V = counts_V[counts_V > 0] / counts_V.sum()
    return math.exp(-float(np.sum(p_V * np.log(p_V))))
