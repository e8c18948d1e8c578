"""Checking indexed files before they are trained on."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from sparsecod_mcore.data import check_dataset
from sparsecod_mcore.data.indexed import _TOKEN_TYPES
from sparsecod_mcore.errors import UserError


def build(prefix: Path, documents: list[list[int]], token_type: type[np.integer]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_type)
    for tokens in documents:
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_what_megatron_wrote_is_read(tmp_path: Path) -> None:
    for token_type in _TOKEN_TYPES.values():
        documents = [[1, 2, 3], [4], list(range(100))]
        prefix = build(tmp_path / token_type.__name__, documents, token_type)
        found = check_dataset(prefix)
        assert (found.documents, found.tokens, found.token_type) == (3, 104, token_type)
        assert np.concatenate(list(found.chunks())).tolist() == [token for tokens in documents for token in tokens]
        assert DType.code_from_dtype(token_type) in _TOKEN_TYPES


def test_files_of_the_project_pass(indexed_prefix: str) -> None:
    found = check_dataset(f"{indexed_prefix}_train")
    assert found.documents == len(IndexedDataset(f"{indexed_prefix}_train"))


def test_documents_of_several_sequences_and_modes_are_megatron_too(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=np.int32)
    builder.add_document(np.arange(10), [4, 6])
    builder.add_document(np.arange(3), [3])
    builder.finalize(f"{tmp_path}/a.idx")
    found = check_dataset(tmp_path / "a")
    assert (found.documents, found.tokens) == (2, 13)


def remove(path: Path) -> None:
    path.unlink()


def resize(by: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content + b"\0" * by if by > 0 else content[:by])

    return change


def poke(offset: int, content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset, 0 if offset >= 0 else 2)
            file.write(content)

    return change


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (".bin", remove, r"_train\.bin does not exist although corpus_train\.idx does"),
    (".idx", remove, r"_train\.idx does not exist although corpus_train\.bin does"),
    (".bin", resize(-2), r"_train\.bin is cut short: it has \d+ bytes, but its \.idx states \d+"),
    (".bin", resize(2), r"_train\.bin is too long"),
    (".idx", resize(-1), r"_train\.idx is cut short"),
    (".idx", resize(1), r"_train\.idx is too long"),
    (".idx", lambda path: path.write_bytes(b""), r"_train\.idx is no index of a Megatron dataset"),
    (
        ".idx",
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        r"_train\.idx is cut short: it has 20 bytes",
    ),
    (".idx", poke(0, b"TEXT"), r"_train\.idx is no index of a Megatron dataset"),
    (".idx", poke(9, struct.pack("<Q", 7)), r"_train\.idx has version 7 and type code 8"),
    (".idx", poke(17, b"\x07"), r"_train\.idx has version 1 and type code 7"),
    (".idx", poke(-8, struct.pack("<q", 1)), r"_train\.idx is damaged"),
]


@pytest.mark.parametrize(("suffix", "damage", "reason"), DAMAGE)
def test_damage_is_named(suffix: str, damage: Callable[[Path], None], reason: str, copied_prefix: str) -> None:
    damage(Path(f"{copied_prefix}_train{suffix}"))
    with pytest.raises(UserError, match=reason) as caught:
        check_dataset(f"{copied_prefix}_train")
    assert "\n" not in str(caught.value)


def test_nothing_to_train_on_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.idx does not exist; tools/preprocess_data\.py makes it"):
        check_dataset(tmp_path / "absent")
    with pytest.raises(UserError, match=r"empty\.idx holds no documents"):
        check_dataset(build(tmp_path / "empty", [], np.int32))
    with pytest.raises(UserError, match=r"hollow\.idx holds no tokens"):
        check_dataset(build(tmp_path / "hollow", [[], []], np.int32))
