"""Reading documents from Hugging Face data sets that lie on this machine."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsecod_mcore.data import HuggingFaceCorpus, LimitedCorpus
from sparsecod_mcore.data.documents import Corpus, text_of
from sparsecod_mcore.errors import UserError

datasets = pytest.importorskip("datasets")


def read(corpus: Corpus) -> list[str]:
    return [text_of(record) for record in corpus.records()]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set as the hub holds them: Parquet files of several columns."""
    folder = tmp_path_factory.mktemp("dataset")
    for number, part in enumerate((texts[:40], texts[40:])):
        table = pa.table({"text": part, "url": ["https://example.org"] * len(part)})
        pq.write_table(table, folder / f"train-{number:05d}-of-00002.parquet")
    return folder


def test_a_folder_a_file_and_a_glob_of_parquet(folder: Path, texts: list[str]) -> None:
    assert read(HuggingFaceCorpus(str(folder))) == texts
    assert read(HuggingFaceCorpus(str(folder / "train-00001-of-00002.parquet"))) == texts[40:]
    assert read(HuggingFaceCorpus(f"{folder}/*.parquet")) == texts


def test_what_save_to_disk_wrote(tmp_path: Path, texts: list[str]) -> None:
    saved = datasets.Dataset.from_dict({"text": texts})
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "several"))
    assert read(HuggingFaceCorpus(str(tmp_path / "one"))) == texts
    assert read(HuggingFaceCorpus(str(tmp_path / "several"))) == texts
    [arrow] = (tmp_path / "one").glob("*.arrow")
    assert read(HuggingFaceCorpus(str(arrow))) == texts


def test_the_limit_and_another_column(folder: Path, texts: list[str]) -> None:
    assert read(LimitedCorpus(HuggingFaceCorpus(str(folder)), 45)) == texts[:45]
    assert set(read(HuggingFaceCorpus(str(folder), text_key="url"))) == {"https://example.org"}


def test_identity_holds_the_files_of_a_local_data_set(folder: Path) -> None:
    files = [entry["name"] for entry in HuggingFaceCorpus(str(folder)).identity()[1:]]
    assert files == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert HuggingFaceCorpus("owner/name", "a").identity() != HuggingFaceCorpus("owner/name", "b").identity()


def test_what_cannot_be_opened_is_named(folder: Path, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None]})
    pq.write_table(table, tmp_path / "null.parquet")
    for corpus, reason in [
        (HuggingFaceCorpus(str(tmp_path / "absent")), "absent cannot be opened"),
        (HuggingFaceCorpus(str(folder), "nope"), "cannot be opened .*nope"),
        (HuggingFaceCorpus(str(folder), split="validation"), "cannot be opened .*validation"),
        (HuggingFaceCorpus(str(folder), text_key="body"), r"no column 'body' \(its columns: text, url\)"),
        (HuggingFaceCorpus(str(tmp_path / "null.parquet")), "row 2 .* holds NoneType"),
    ]:
        with pytest.raises(UserError, match=reason):
            read(corpus)
