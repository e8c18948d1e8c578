"""From documents to indexed splits: what is in them, for any workers, and what a second run does."""

import gzip
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from sparsecod_mcore.data import (
    FileCorpus,
    LimitedCorpus,
    TextTokenizer,
    load_tokenizer,
    manifest_path,
    preprocess,
    read_manifest,
)
from sparsecod_mcore.data import parts as parts_module
from sparsecod_mcore.data.parts import PartsSummary, content_hash
from sparsecod_mcore.data.split import held_out_below
from sparsecod_mcore.errors import UserError


def corpus_of(path: Path, texts: list[str]) -> FileCorpus:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FileCorpus([str(path)])


def documents(prefix: str, tokenizer: TextTokenizer) -> list[str]:
    """The texts of a split as Megatron reads it, each without its end-of-text token."""
    texts = []
    for tokens_N in IndexedDataset(prefix):
        assert tokens_N[-1] == tokenizer.eos_id
        assert np.count_nonzero(tokens_N == tokenizer.eos_id) == 1
        texts.append(tokenizer.decode(tokens_N[:-1].tolist()))
    return texts


def file_hashes(folder: Path, stem: str) -> dict[str, str]:
    return {
        path.name.removeprefix(stem): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(f"{stem}*")
    }


def test_documents_come_back_in_order_and_the_manifest_counts_them(
    indexed_prefix: str, texts: list[str], tokenizer: TextTokenizer
) -> None:
    train = documents(f"{indexed_prefix}_train", tokenizer)
    valid = documents(f"{indexed_prefix}_valid", tokenizer)
    held_out = [text for text in texts if content_hash(text) < 0.2 * 2**64]
    assert 0 < len(held_out) < len(texts)
    assert valid == held_out
    assert train == [text for text in texts if text not in held_out]
    manifest = read_manifest(manifest_path(f"{indexed_prefix}_valid"))
    assert manifest is not None
    assert manifest.token_type == "uint16"
    assert manifest.origin["tokenizer"]["vocabulary_size"] == 400
    for name, split_texts in (("train", train), ("valid", valid)):
        tokens = [token for text in split_texts for token in tokenizer.encode(text)]
        split = manifest.splits[name]
        assert (split.documents, split.tokens) == (len(split_texts), len(tokens))
        assert split.max_token_id == max(tokens)
        assert split.bytes == Path(f"{indexed_prefix}_{name}.bin").stat().st_size


def test_bytes_do_not_depend_on_the_workers(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 3_000)
    for workers in (1, 2, 3):
        corpus = FileCorpus([str(corpus_path)])
        preprocess(corpus, tmp_path / f"w{workers}", tokenizer_path, valid_fraction=0.2, workers=workers)
    first = file_hashes(tmp_path, "w1")
    assert set(first) == {".json", "_train.bin", "_train.idx", "_valid.bin", "_valid.idx"}
    assert file_hashes(tmp_path, "w2") == file_hashes(tmp_path, "w3") == first


def test_bytes_do_not_depend_on_the_parts(
    indexed_prefix: str,
    corpus_path: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 1)
    corpus = FileCorpus([str(corpus_path)])
    preprocess(corpus, tmp_path / "corpus", tokenizer_path, valid_fraction=0.2, workers=1)
    assert file_hashes(tmp_path, "corpus") == file_hashes(Path(indexed_prefix).parent, "corpus")


def test_a_document_falls_on_the_same_side_in_every_corpus(
    texts: list[str], tokenizer: TextTokenizer, tokenizer_path: Path, tmp_path: Path
) -> None:
    corpus = corpus_of(tmp_path / "a.jsonl", [*texts[::-3], "one more document", *texts[::2]])
    preprocess(corpus, tmp_path / "a", tokenizer_path, valid_fraction=0.2, workers=1)
    for name, held_out in (("train", False), ("valid", True)):
        for text in documents(f"{tmp_path}/a_{name}", tokenizer):
            assert (content_hash(text) < 0.2 * 2**64) is held_out


@pytest.mark.parametrize("fraction", [1e-12, 1 - 1e-12])
def test_two_documents_leave_one_on_each_side(
    fraction: float, tokenizer: TextTokenizer, tokenizer_path: Path, tmp_path: Path
) -> None:
    corpus = corpus_of(tmp_path / "a.jsonl", ["a document", "another document"])
    preprocess(corpus, tmp_path / "a", tokenizer_path, valid_fraction=fraction, workers=1)
    sides = [documents(f"{tmp_path}/a_{name}", tokenizer) for name in ("train", "valid")]
    assert sorted(sides) == [["a document"], ["another document"]]


def test_the_threshold_is_the_fraction_unless_a_side_would_be_empty() -> None:
    middle = PartsSummary(documents=9, empty_documents=0, lowest_hash=10, highest_hash=2**64 - 10)
    assert held_out_below(middle, 0.25) == 2**62
    assert held_out_below(middle, 0.0) == 0
    assert held_out_below(middle, 1e-30) == 11
    assert held_out_below(middle._replace(highest_hash=2**60), 0.25) == 2**60


def test_one_text_many_times_cannot_be_held_out(tokenizer_path: Path, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a.jsonl", ["the same"] * 3)
    with pytest.raises(UserError, match="all 3 documents are the same text"):
        preprocess(corpus, tmp_path / "a", tokenizer_path, workers=1)
    assert not list(tmp_path.glob("a_*"))


def test_a_single_document_is_cut_at_its_end(
    texts: list[str], tokenizer: TextTokenizer, tokenizer_path: Path, tmp_path: Path
) -> None:
    book = "\n".join(texts)
    (tmp_path / "book.txt").write_text(book)
    manifest = preprocess(
        FileCorpus([str(tmp_path / "book.txt")]),
        tmp_path / "a",
        tokenizer_path,
        valid_fraction=0.1,
        workers=1,
    )
    train, valid = (documents(f"{tmp_path}/a_{name}", tokenizer) for name in ("train", "valid"))
    assert len(train) == len(valid) == 1
    assert train[0] + valid[0] == book
    tokens = sum(split.tokens for split in manifest.splits.values()) - 2
    assert manifest.splits["valid"].tokens - 1 == round(0.1 * tokens)


def test_no_held_out_split_and_a_file_of_its_own(
    texts: list[str], tokenizer: TextTokenizer, tokenizer_path: Path, tmp_path: Path
) -> None:
    train, valid = corpus_of(tmp_path / "t.jsonl", texts), corpus_of(tmp_path / "v.jsonl", texts[:5])
    preprocess(train, tmp_path / "a", tokenizer_path, valid_corpus=valid, workers=1)
    assert documents(f"{tmp_path}/a_train", tokenizer) == texts
    assert documents(f"{tmp_path}/a_valid", tokenizer) == texts[:5]
    manifest = preprocess(train, tmp_path / "a", tokenizer_path, valid_fraction=0, overwrite=True, workers=1)
    assert list(manifest.splits) == ["train"]
    assert documents(f"{tmp_path}/a_train", tokenizer) == texts
    assert not Path(f"{tmp_path}/a_valid.bin").exists()
    with pytest.raises(UserError, match="held-out data has no document"):
        preprocess(train, tmp_path / "b", tokenizer_path, valid_corpus=corpus_of(tmp_path / "e.jsonl", []), workers=1)


def test_documents_without_text_are_dropped_and_counted(
    texts: list[str],
    tokenizer: TextTokenizer,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 1)  # a part each: some parts are empty
    corpus = corpus_of(tmp_path / "a.jsonl", ["", *texts[:4], " \n\t", ""])
    manifest = preprocess(corpus, tmp_path / "a", tokenizer_path, valid_fraction=0, workers=1)
    assert manifest.empty_documents == 3
    assert documents(f"{tmp_path}/a_train", tokenizer) == texts[:4]
    with pytest.raises(UserError, match="the corpus has no document with text"):
        preprocess(corpus_of(tmp_path / "b.jsonl", ["", " "]), tmp_path / "b", tokenizer_path, workers=1)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    words = {f"w{i}": i + 1 for i in range(70_000)} | {"</s>": 0}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (tmp_path / "t.json").write_text(
        json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []})
    )
    corpus = corpus_of(tmp_path / "a.jsonl", ["w69999 w1 w65535 w65536"])
    manifest = preprocess(corpus, tmp_path / "a", tmp_path / "t.json", valid_fraction=0, workers=1)
    assert manifest.token_type == "int32"
    dataset = IndexedDataset(f"{tmp_path}/a_train")  # its sequences live no longer than itself
    assert dataset[0].tolist() == [70_000, 2, 65_536, 65_537, 0]


def test_a_complete_output_is_left_alone_and_damage_is_repaired(
    copied_prefix: str, corpus_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(copied_prefix).parent
    before = file_hashes(folder, "corpus")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    def again() -> str:
        corpus = FileCorpus([str(corpus_path)])
        preprocess(corpus, copied_prefix, tokenizer_path, valid_fraction=0.2, workers=1)
        return capsys.readouterr().out

    assert again() == f"{copied_prefix}: already complete\n"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    with Path(f"{copied_prefix}_train.bin").open("r+b") as file:
        file.truncate(100)
    assert "cut short" in again()
    assert file_hashes(folder, "corpus") == before
    Path(f"{copied_prefix}_valid.idx").unlink()
    assert "does not exist" in again()
    assert file_hashes(folder, "corpus") == before


def test_other_inputs_replace_an_output_only_when_told_to(
    copied_prefix: str, corpus_path: Path, tokenizer_path: Path, texts: list[str]
) -> None:
    corpus = FileCorpus([str(corpus_path)])
    other = LimitedCorpus(corpus, 30)
    before = file_hashes(Path(copied_prefix).parent, "corpus")
    with pytest.raises(UserError, match=r"made from something else \(what differs: sources\).*--overwrite"):
        preprocess(other, copied_prefix, tokenizer_path, valid_fraction=0.2, workers=1)
    with pytest.raises(UserError, match=r"what differs: valid_fraction\)"):
        preprocess(corpus, copied_prefix, tokenizer_path, valid_fraction=0.1, workers=1)
    assert file_hashes(Path(copied_prefix).parent, "corpus") == before
    manifest = preprocess(other, copied_prefix, tokenizer_path, valid_fraction=0.2, workers=1, overwrite=True)
    assert sum(split.documents for split in manifest.splits.values()) == 30


def test_data_of_unknown_origin_is_not_replaced_unasked(
    copied_prefix: str, corpus_path: Path, tokenizer_path: Path
) -> None:
    manifest_path(copied_prefix).unlink()
    corpus = FileCorpus([str(corpus_path)])
    with pytest.raises(UserError, match=r"corpus_train\.bin exists and nothing says what it was made from"):
        preprocess(corpus, copied_prefix, tokenizer_path, workers=1)
    preprocess(corpus, copied_prefix, tokenizer_path, workers=1, overwrite=True)
    assert manifest_path(copied_prefix).exists()


def test_unfinished_work_on_something_else_is_removed_and_a_foreign_folder_is_not(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = corpus_of(tmp_path / "broken.jsonl", ["a", "b"])
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{\n')
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        preprocess(broken, tmp_path / "a", tokenizer_path, workers=1)
    assert (tmp_path / "a.parts").is_dir()
    preprocess(FileCorpus([str(corpus_path)]), tmp_path / "a", tokenizer_path, workers=1)
    assert "unfinished work on something else" in capsys.readouterr().out
    assert not (tmp_path / "a.parts").exists()
    (tmp_path / "b.parts").mkdir()
    (tmp_path / "b.parts" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=re.escape("b.parts is needed for unfinished work")):
        preprocess(FileCorpus([str(corpus_path)]), tmp_path / "b", tokenizer_path, workers=1)
    assert (tmp_path / "b.parts" / "mine.txt").exists()


def test_novels_with_the_gpt_neox_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    tokenizer_path = shared_data / "gpt-neox-20b" / "tokenizer.json"
    novels = shared_data / "novels" / "valid.jsonl.gz"
    manifest = preprocess(FileCorpus([str(novels)]), tmp_path / "novels", tokenizer_path, workers=2)
    tokenizer = load_tokenizer(tokenizer_path)
    with gzip.open(novels) as lines:
        # The tokenizer's own first step composes characters (NFC).
        expected = [unicodedata.normalize("NFC", json.loads(line)["text"]) for line in lines]
    found = [documents(f"{tmp_path}/novels_{name}", tokenizer) for name in ("train", "valid")]
    assert [len(side) for side in found] == [2, 1]
    assert sorted(found[0] + found[1]) == sorted(expected)
    assert manifest.token_type == "uint16"
