"""Documents from files: plain text (one document each) and JSON lines, as they are or compressed."""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import zstandard

from sparsecod_mcore.data.atomic import make_folder, publish, temporary
from sparsecod_mcore.data.documents import Corpus, Record, text_of
from sparsecod_mcore.data.progress import Progress
from sparsecod_mcore.errors import UserError

JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst")
_COLUMNAR = (".parquet", ".arrow")


class FileCorpus:
    """The documents of files and glob patterns: file by file in the order given, each file once.

    A name that ends in .jsonl, .ndjson or .json (then perhaps .gz or .zst) holds one JSON object per line
    with its text under `text_key`; any other file is UTF-8 text and one document. Raises `UserError` for a
    pattern without files.
    """

    def __init__(self, inputs: Sequence[str], text_key: str = "text") -> None:
        self.paths = _expand(inputs)
        self.text_key = text_key

    def identity(self) -> list[dict[str, object]]:
        """Name, size and time of change of every file, and the key of the text."""
        return [file_identity(path) | {"text_key": self.text_key} for path in self.paths]

    def records(self) -> Iterator[Record]:
        """Yield the documents; blank lines of JSONL hold none."""
        sizes = [path.stat().st_size for path in self.paths]
        total = max(sum(sizes), 1)
        for number, path in enumerate(self.paths):
            before = sum(sizes[:number])
            try:
                with path.open("rb") as file:
                    stream = _decompressed(file, path)
                    if _inner_suffix(path) in JSON_LINES:
                        for line, raw in enumerate(stream, start=1):
                            if not raw.isspace():
                                fraction = (before + file.tell()) / total
                                yield Record(str(path), line, raw, self.text_key, fraction)
                    else:
                        yield Record(str(path), 0, stream.read(), None, (before + sizes[number]) / total)
            except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
                raise UserError(f"{path} is damaged or not a {path.suffix} file ({error})") from None
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror})") from None


def save_corpus(corpus: Corpus, path: str | Path) -> int:
    """Write the documents of any corpus to a .jsonl file, under the key "text"; return their number.

    For a corpus that takes long to read or may change, and is read more than once.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise UserError(f"a corpus is saved as .jsonl, but {path} was given")
    make_folder(path.parent)
    documents = 0
    with Progress(f"writing {path.name}") as progress, temporary(path).open("w", encoding="utf-8") as file:
        for record in corpus.records():
            text = text_of(record)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            documents += 1
            progress.advance(1, len(text), record.fraction)
    publish(path)
    return documents


def file_identity(path: Path) -> dict[str, object]:
    """What tells versions of a file apart without reading it: name, size in bytes, time of change in ns."""
    found = path.stat()
    return {"name": path.name, "bytes": found.st_size, "modified_ns": found.st_mtime_ns}


def _expand(inputs: Sequence[str]) -> list[Path]:
    paths: dict[Path, None] = {}
    for given in inputs:
        if Path(given).exists():
            found = [given]
        elif glob.has_magic(given):
            found = sorted(name for name in glob.glob(given, recursive=True) if Path(name).is_file())
        else:
            raise UserError(f"{given} does not exist; files and glob patterns are accepted")
        if not found:
            raise UserError(f"no file matches {given}")
        paths.update(dict.fromkeys(map(Path, found)))
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name its files, for example '{path}/*.jsonl.gz'")
        if path.suffix.lower() in _COLUMNAR:
            raise UserError(f"{path} is a table of a Hugging Face data set; give it with --hf-dataset")
    return list(paths)


def _inner_suffix(path: Path) -> str:
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def _decompressed(file: BinaryIO, path: Path) -> io.BufferedIOBase | BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=file))
        case ".zst":
            return io.BufferedReader(_ZstdStream(file), buffer_size=1 << 20)
        case _:
            return file


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames.

    zstandard's own reader takes a file that was cut off for a shorter one; this one raises EOFError.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            compressed = self._frame.unused_data if self._frame.eof else b""
            compressed = compressed or self._file.read(1 << 18)
            if not compressed:
                if self._begun and not self._frame.eof:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._begun = True
            self._pending = memoryview(self._frame.decompress(compressed))
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count
