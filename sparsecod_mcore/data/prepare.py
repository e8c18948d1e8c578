"""From a corpus to a dataset and its tokenizer, in one folder, once."""

import hashlib
import json
from pathlib import Path

from sparsecod_mcore.data.bpe import train_tokenizer
from sparsecod_mcore.data.docstrings import DocstringCorpus
from sparsecod_mcore.data.documents import Corpus
from sparsecod_mcore.data.files import FileCorpus, save_corpus
from sparsecod_mcore.data.preprocess import preprocess


def fingerprint(corpus: Corpus, tokenizer: Path | None, *others: str) -> str:
    """Eight digits that tell what data was made from, and what else is given, for the name of their folder."""
    made_from = [corpus.identity(), None if tokenizer is None else str(tokenizer), *others]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:8]


def prepare(corpus: Corpus, folder: Path, tokenizer: Path | None, vocabulary_size: int) -> tuple[Path, Path]:
    """Return the prefix of a dataset of `corpus` in `folder`, and its tokenizer: a BPE trained on it unless given.

    Docstrings are extracted to a file first: what is installed may change between two calls.
    """
    if isinstance(corpus, DocstringCorpus):
        extracted = folder / "docstrings.jsonl"
        if not extracted.exists():
            save_corpus(corpus, extracted)
        corpus = FileCorpus([str(extracted)])
    if tokenizer is None:
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.exists():
            train_tokenizer(corpus, tokenizer, vocabulary_size)
    data = folder / "text"
    preprocess(corpus, data, tokenizer)
    return data, tokenizer
