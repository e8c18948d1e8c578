"""A small corpus and a small tokenizer."""

import json
import random
import shutil
from pathlib import Path

import pytest

from sparsecod_mcore.data import FileCorpus, TextTokenizer, load_tokenizer, preprocess, train_tokenizer

SENTENCES = [
    "The residual stream carries what every layer adds to it.",
    "Variance grows with depth unless something holds it back.",
    "Ein Satz mit Umlauten: äöü, ein Gedankenstrich – und 漢字.",
    "A layer close to the identity does little of the work.\n\nA new paragraph begins here.",
]


def make_texts(documents: int) -> list[str]:
    """Different texts of some hundred characters, the same in every run."""
    draw = random.Random(1)
    return [f"Document {number}. " + " ".join(draw.choices(SENTENCES, k=6)) for number in range(documents)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """One object per line."""
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(60)


@pytest.fixture(scope="session")
def corpus_path(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer_path(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(FileCorpus([str(corpus_path)]), path, vocabulary_size=400)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> TextTokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def indexed_prefix(corpus_path: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of the preprocessed corpus; copy its files before changing them."""
    prefix = str(tmp_path_factory.mktemp("indexed") / "corpus")
    preprocess(FileCorpus([str(corpus_path)]), prefix, tokenizer_path, valid_fraction=0.2, workers=1)
    return prefix


@pytest.fixture
def copied_prefix(indexed_prefix: str, tmp_path: Path) -> str:
    """A copy of the preprocessed corpus to be damaged."""
    for path in Path(indexed_prefix).parent.iterdir():
        shutil.copy2(path, tmp_path)
    return str(tmp_path / "corpus")
