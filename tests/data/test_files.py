"""Reading documents from files."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from sparsecod_mcore.data import FileCorpus, LimitedCorpus, save_corpus
from sparsecod_mcore.data.documents import Corpus, text_of
from sparsecod_mcore.errors import UserError


def read(corpus: Corpus) -> list[str]:
    return [text_of(record) for record in corpus.records()]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


TEXTS = ["first", "zweites, with ümlaut", "third\nwith a line break", " "]
ENCODERS = {
    "jsonl": lambda content: content,
    "ndjson": lambda content: content,
    "json": lambda content: content,
    "jsonl.gz": gzip.compress,
    "jsonl.zst": zstandard.compress,
    "json.GZ": gzip.compress,
}


@pytest.mark.parametrize("suffix", ENCODERS)
def test_json_lines_in_every_spelling(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus.{suffix}"
    path.write_bytes(ENCODERS[suffix](jsonl(TEXTS)))
    records = list(FileCorpus([str(path)]).records())
    assert [text_of(record) for record in records] == TEXTS
    assert [record.line for record in records] == [1, 2, 3, 4]
    assert records[-1].fraction == 1.0


@pytest.mark.parametrize("name", ["book.txt", "notes.md", "README", "chapter.tex"])
def test_any_other_file_is_one_document(name: str, tmp_path: Path) -> None:
    text = 'A "quote",\r\nlines, {braces}\n\nand a last line without an end'
    (tmp_path / name).write_bytes(text.encode())
    assert read(FileCorpus([str(tmp_path / name)])) == [text]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert read(FileCorpus([str(tmp_path / f"{name}.gz")])) == [text]


def test_byte_order_marks_and_blank_lines_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("plain".encode("utf-8-sig"))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["one"]) + b"\n   \n" + jsonl(["two"]).strip())
    records = list(FileCorpus([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]).records())
    assert [text_of(record) for record in records] == ["plain", "one", "two"]
    assert [record.line for record in records] == [0, 1, 4]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud83dy \\ud83d\\ude00"}\n')
    assert read(FileCorpus([str(tmp_path / "a.jsonl")])) == ["x?y 😀"]


def test_another_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, key="content"))
    assert read(FileCorpus([str(tmp_path / "a.jsonl")], text_key="content")) == TEXTS


def test_globs_are_sorted_and_files_named_twice_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("b.txt", "a.txt", "inner/c.txt"):
        (tmp_path / name).write_text(name)
    assert read(FileCorpus([f"{tmp_path}/*.txt"])) == ["a.txt", "b.txt"]
    assert read(FileCorpus([f"{tmp_path}/b.txt", f"{tmp_path}/**/*.txt"])) == [
        "b.txt",
        "a.txt",
        "inner/c.txt",
    ]


def test_zstandard_of_several_frames_and_more_than_a_buffer(tmp_path: Path) -> None:
    many = [f"document {number} " + "x" * (number % 977) for number in range(5000)]
    frames = [zstandard.compress(jsonl(many[:100])), zstandard.compress(jsonl(many[100:]))]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(FileCorpus([str(tmp_path / "a.jsonl.zst")])) == many


def test_the_limit_ends_reading_and_is_part_of_the_identity(corpus_path: Path, texts: list[str]) -> None:
    corpus = FileCorpus([str(corpus_path)])
    limited = LimitedCorpus(corpus, 7)
    assert read(limited) == texts[:7]
    assert [record.fraction for record in limited.records()][-1] == 1.0
    assert limited.identity() != corpus.identity()
    with pytest.raises(UserError, match="limit is 0 documents"):
        LimitedCorpus(corpus, 0)


def test_identity_follows_the_content_of_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = FileCorpus([str(path)]).identity()
    assert before == FileCorpus([str(path)]).identity()
    path.write_text("other")
    assert before != FileCorpus([str(path)]).identity()


def test_a_saved_corpus_holds_the_same_documents(tmp_path: Path) -> None:
    texts = [*TEXTS, "line\u2028separator, tab\t and a \\ backslash"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts, key="body"))
    corpus = FileCorpus([str(tmp_path / "a.jsonl")], text_key="body")
    assert save_corpus(LimitedCorpus(corpus, 2), tmp_path / "new" / "saved.jsonl") == 2
    assert save_corpus(corpus, tmp_path / "new" / "saved.jsonl") == len(texts)
    assert read(FileCorpus([str(tmp_path / "new" / "saved.jsonl")])) == texts
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved.jsonl"]
    with pytest.raises(UserError, match=r"is saved as \.jsonl"):
        save_corpus(corpus, tmp_path / "saved.txt")


BAD_LINES = {
    '{"text": "cut': r"a\.jsonl line 2 is not valid JSON",
    '["text"]': r"a\.jsonl line 2 is a JSON array",
    "null": r"a\.jsonl line 2 is a JSON null",
    '{"body": "x", "id": 1}': r"a\.jsonl line 2 has no key 'text' \(its keys: 'body', 'id'\)",
    '{"text": 3}': r"a\.jsonl line 2 holds a JSON number under 'text'",
    '{"text": "\udcff"}': r"a\.jsonl line 2 is not valid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(UserError, match=BAD_LINES[line]):
        read(FileCorpus([str(path)]))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS * 100))[:-20])
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(jsonl(TEXTS * 100))[:-20])
    (tmp_path / "not.jsonl.gz").write_bytes(jsonl(TEXTS))
    (tmp_path / "not.jsonl.zst").write_bytes(jsonl(TEXTS))
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    for name, reason in {
        "latin.txt": "is not text in UTF-8",
        "cut.jsonl.gz": "is damaged or not a .gz file",
        "cut.jsonl.zst": "is damaged or not a .zst file",
        "not.jsonl.gz": "is damaged or not a .gz file",
        "not.jsonl.zst": "is damaged or not a .zst file",
        "table.parquet": "give it with --hf-dataset",
        "absent.jsonl": "does not exist",
        "*.absent": "no file matches",
        "": "is a folder",
    }.items():
        with pytest.raises(UserError, match=f"{reason}") as caught:
            read(FileCorpus([f"{tmp_path}/{name}" if name else str(tmp_path)]))
        assert str(tmp_path) in str(caught.value)
