"""Documents on their way from a source to its text: the record, and what a corpus offers."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from sparsecod_mcore.errors import UserError


class Record(NamedTuple):
    """One document as its source holds it, still to be decoded (which the tokenizing workers do)."""

    source: str  # file or data set, for messages
    line: int  # from 1; 0 where the document is the whole file
    raw: bytes | str
    key: str | None  # the text's key where `raw` is a JSON object
    fraction: float | None  # share of the corpus read once this record is, if known


class Corpus(Protocol):
    """A source of documents in a fixed order."""

    def identity(self) -> list[dict[str, object]]:
        """What its documents depend on, as plain JSON: corpora of equal identity hold the same documents."""

    def records(self) -> Iterator[Record]:
        """Yield every document in order. Raises `UserError` where the source cannot be read."""


class LimitedCorpus:
    """The first `documents` documents of a corpus."""

    def __init__(self, corpus: Corpus, documents: int) -> None:
        if documents < 1:
            raise UserError(f"the limit is {documents} documents, but it has to be at least 1")
        self.corpus = corpus
        self.documents = documents

    def identity(self) -> list[dict[str, object]]:
        return [*self.corpus.identity(), {"limit_documents": self.documents}]

    def records(self) -> Iterator[Record]:
        for number, record in enumerate(islice(self.corpus.records(), self.documents), start=1):
            fraction = max(record.fraction or 0.0, number / self.documents)
            yield record._replace(fraction=fraction)


def text_of(record: Record) -> str:
    """The text of a record, valid Unicode throughout.

    Raises `UserError`, naming file and line, for text that is not UTF-8, a malformed JSON line, a line that
    is not an object, a missing key and a value that is not a string.
    """
    text = _json_text(record, record.key) if record.key is not None else _plain_text(record)
    # JSON can spell half a surrogate pair, which no tokenizer accepts; it becomes a question mark.
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain_text(record: Record) -> str:
    if isinstance(record.raw, str):
        return record.raw
    try:
        return record.raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{record.source} is not text in UTF-8 (byte {error.start} cannot be decoded); "
            "plain text in UTF-8 and JSONL, also as .gz or .zst, are accepted"
        ) from None


def _json_text(record: Record, key: str) -> str:
    place = f"{record.source} line {record.line}"
    try:
        value = json.loads(record.raw)
    except ValueError as error:  # malformed JSON and malformed UTF-8 alike
        raise UserError(f"{place} is not valid JSON ({error}); one object per line is expected") from None
    if not isinstance(value, dict):
        raise UserError(f"{place} is a JSON {_json_type(value)}, but one object per line is expected")
    if key not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise UserError(f"{place} has no key {key!r} (its keys: {keys}); --text-key chooses another")
    text = value[key]
    if not isinstance(text, str):
        raise UserError(f"{place} holds a JSON {_json_type(text)} under {key!r}, but a string is expected")
    return text


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]
