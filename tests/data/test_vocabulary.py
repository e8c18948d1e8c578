"""Tokens against vocabularies, and their unigram perplexity."""

import math
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, models

from sparsecod_mcore.data import (
    FileCorpus,
    check_vocabulary,
    indexed,
    manifest_path,
    train_tokenizer,
    unigram_perplexity,
)
from sparsecod_mcore.errors import UserError


@pytest.fixture
def other_tokenizer(corpus_path: Path, tmp_path: Path) -> Path:
    train_tokenizer(FileCorpus([str(corpus_path)]), tmp_path / "other.json", 300)
    return tmp_path / "other.json"


def write_tokens(prefix: Path, tokens: list[int]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_the_manifest_tells_another_tokenizer(indexed_prefix: str, tokenizer_path: Path, other_tokenizer: Path) -> None:
    for split in ("train", "valid"):
        check_vocabulary(f"{indexed_prefix}_{split}", tokenizer_path)
        with pytest.raises(UserError, match=r"made with a tokenizer of 400 tokens .* another, of 300 tokens"):
            check_vocabulary(f"{indexed_prefix}_{split}", other_tokenizer)


def test_without_a_manifest_the_tokens_tell(copied_prefix: str, tokenizer_path: Path, other_tokenizer: Path) -> None:
    manifest_path(copied_prefix).unlink()
    check_vocabulary(f"{copied_prefix}_train", tokenizer_path)
    with pytest.raises(UserError, match=r"corpus_train\.bin holds token 3\d\d, but .* ends at 299"):
        check_vocabulary(f"{copied_prefix}_train", other_tokenizer)


def test_the_largest_token_may_be_the_last_of_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_CHUNK_TOKENS", 2)
    Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="a")).save(str(tmp_path / "t.json"))
    check_vocabulary(write_tokens(tmp_path / "in", [1, 0, 2, 1, 0]), tmp_path / "t.json")
    with pytest.raises(UserError, match="holds token 3"):
        check_vocabulary(write_tokens(tmp_path / "out", [1, 0, 3, 1, 0]), tmp_path / "t.json")


def test_a_damaged_manifest_is_named(copied_prefix: str, tokenizer_path: Path) -> None:
    manifest = manifest_path(copied_prefix)
    content = manifest.read_text()
    for damaged, reason in {
        content[:-9]: r"corpus\.json is damaged: it is not valid JSON",
        content.replace('"schema_version": 1', '"schema_version": 2'): "no data manifest of schema 1",
        content.replace('"origin"', '"origins"'): "entries of a data manifest are missing or unknown",
        "[]": "no data manifest of schema 1",
    }.items():
        manifest.write_text(damaged)
        with pytest.raises(UserError, match=reason):
            check_vocabulary(f"{copied_prefix}_train", tokenizer_path)


def test_unigram_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unigram_perplexity(write_tokens(tmp_path / "even", [7, 1, 60_000, 3])) == pytest.approx(4.0)
    assert unigram_perplexity(write_tokens(tmp_path / "one", [5, 5])) == pytest.approx(1.0)
    monkeypatch.setattr(indexed, "_CHUNK_TOKENS", 3)
    skewed = write_tokens(tmp_path / "skewed", [9, 9, 0, 9, 9, 9, 4, 9])
    entropy = -(0.75 * math.log(0.75) + 2 * 0.125 * math.log(0.125))
    assert unigram_perplexity(skewed) == pytest.approx(math.exp(entropy))


def test_unigram_perplexity_of_text_lies_below_its_vocabulary(indexed_prefix: str) -> None:
    assert 20 < unigram_perplexity(f"{indexed_prefix}_valid") < 400
