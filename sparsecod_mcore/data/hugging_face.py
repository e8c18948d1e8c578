"""Documents from a Hugging Face data set: on the hub, saved to a folder, or its Parquet or Arrow files."""

import glob
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsecod_mcore.data.documents import Record
from sparsecod_mcore.data.files import file_identity
from sparsecod_mcore.errors import UserError

_ROWS_AT_ONCE = 256
_FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}


class HuggingFaceCorpus:
    """The rows of one split of a data set, streamed: nothing is stored besides what `datasets` itself caches.

    `name` is a name on the hub (`HuggingFaceFW/fineweb-edu` with the config `sample-100BT`), a folder, or a
    .parquet or .arrow file or a glob pattern of these. Raises `UserError` where it cannot be opened or has
    no column `text_key`.
    """

    def __init__(self, name: str, config: str | None = None, split: str = "train", text_key: str = "text") -> None:
        self.name = name
        self.config = config
        self.split = split
        self.text_key = text_key

    def identity(self) -> list[dict[str, object]]:
        """The names given and, of a local data set, the name, size and time of change of its files."""
        given: dict[str, object] = {
            "name": self.name,
            "config": self.config,
            "split": self.split,
            "text_key": self.text_key,
        }
        local = Path(self.name)
        found = local.rglob("*") if local.is_dir() else map(Path, glob.glob(self.name, recursive=True))
        return [given, *(file_identity(path) for path in sorted(found) if path.is_file())]

    def records(self) -> Iterator[Record]:
        rows = self._open()
        columns = rows.column_names
        if columns is not None and self.text_key not in columns:
            raise UserError(
                f"the data set {self.name} has no column {self.text_key!r} "
                f"(its columns: {', '.join(columns)}); --text-key chooses another"
            )
        total = _number_of_rows(rows)
        number = 0
        for batch in rows.select_columns([self.text_key]).iter(_ROWS_AT_ONCE):
            for text in batch[self.text_key]:
                number += 1
                if not isinstance(text, str):
                    raise UserError(
                        f"row {number} of the data set {self.name} holds {type(text).__name__} under "
                        f"{self.text_key!r}, but a string is expected"
                    )
                yield Record(self.name, number, text, None, number / total if total else None)

    def _open(self) -> Any:
        try:
            import datasets
        except ModuleNotFoundError:
            raise UserError("--hf-dataset needs the package `datasets`: pip install datasets") from None
        # Its retries while the hub cannot be reached; the outcome is reported below.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        local = Path(self.name)
        try:
            if file_format := _FILE_FORMATS.get(local.suffix.lower()):
                return datasets.load_dataset(
                    file_format, data_files={self.split: self.name}, split=self.split, streaming=True
                )
            if (local / "state.json").exists():  # Dataset.save_to_disk; it has no splits
                return datasets.load_from_disk(self.name)
            return datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        except (ValueError, OSError) as error:  # unknown names and splits; missing files, no network
            reason = " ".join(str(error).split())
            raise UserError(f"the data set {self.name} cannot be opened ({reason})") from None


def _number_of_rows(rows: Any) -> int | None:
    splits = rows.info.splits or {}
    return splits[str(rows.split)].num_examples if str(rows.split) in splits else None
