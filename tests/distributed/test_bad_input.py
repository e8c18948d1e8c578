"""What a user gets wrong costs exit code 2 and one clear sentence, before anything is written."""

import os
import shutil
from pathlib import Path

import pytest

from sparsecod_mcore.data import FileCorpus, train_tokenizer
from tests.distributed.jobs import Data, train

pytestmark = pytest.mark.distributed


def complaint(run: Path, config: Path, data: Data, *flags: object, processes: int = 1) -> str:
    """The sentence, of a job that must end with exit code 2 (which a launcher reports and turns into 1)."""
    existed = run.exists()
    job = train(run, config, data, *flags, processes=processes, ok=False)
    if processes == 1:
        assert job.returncode == 2, job.errors[-3000:]
        assert "Traceback" not in job.errors
    else:
        assert "exitcode  : 2" in job.errors, job.errors[-3000:]
    assert existed or not (run / "config.yaml").exists()
    return job.complaint()


def test_misspelt_key(tmp_path: Path, dense_config: Path, data: Data) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text(dense_config.read_text() + "cod: {stat_interval: 2}\n")
    said = complaint(tmp_path / "run", config, data)
    assert str(config) in said and "cod.stat_interval" in said and "cod.stats_interval" in said


def test_misspelt_flag(tmp_path: Path, dense_config: Path, data: Data) -> None:
    assert "--hidden-size" in complaint(tmp_path / "run", dense_config, data, "--hiden-size", 32)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_and_truncated_data(suffix: str, tmp_path: Path, dense_config: Path, data: Data) -> None:
    for path in data.prefix.parent.glob("docs*"):
        shutil.copy(path, tmp_path)
    broken = Data(tmp_path / "docs", data.tokenizer)
    path = tmp_path / f"docs_train.{suffix}"
    os.truncate(path, path.stat().st_size - 3)
    assert str(path) in complaint(tmp_path / "run", dense_config, broken)
    path.unlink()
    assert str(path) in complaint(tmp_path / "run", dense_config, broken)


def test_no_data(tmp_path: Path, dense_config: Path, data: Data) -> None:
    assert "nowhere_train" in complaint(tmp_path / "run", dense_config, Data(tmp_path / "nowhere", data.tokenizer))


def test_another_tokenizer(tmp_path: Path, dense_config: Path, data: Data) -> None:
    other, broken = tmp_path / "tokenizer.json", tmp_path / "broken.json"
    train_tokenizer(FileCorpus([__file__]), other, 300)
    said = complaint(tmp_path / "run", dense_config, Data(data.prefix, other))
    assert str(other) in said and "docs_train" in said
    broken.write_text(data.tokenizer.read_text().replace("Ġthe", "Ġthx"))
    assert str(broken) in complaint(tmp_path / "run", dense_config, Data(data.prefix, broken))


def test_heads_not_divisible(tmp_path: Path, dense_config: Path, data: Data) -> None:
    flags = ("--tensor-model-parallel-size", 3)
    said = complaint(tmp_path / "run", dense_config, data, *flags, processes=3)
    assert "num_attention_heads 4" in said and "3" in said


def test_experts_not_divisible(tmp_path: Path, moe_config: Path, data: Data) -> None:
    flags = ("--expert-model-parallel-size", 2, "--num-experts", 5)
    assert "num_experts 5" in complaint(tmp_path / "run", moe_config, data, *flags, processes=2)


def test_warm_up_longer_than_the_run(tmp_path: Path, dense_config: Path, data: Data) -> None:
    said = complaint(tmp_path / "run", dense_config, data, "--train-iters", 2)
    assert said == "lr_warmup_iters 2 must be below the 2 iterations of the schedule"


def test_what_megatron_refuses(tmp_path: Path, dense_config: Path, data: Data) -> None:
    said = complaint(tmp_path / "run", dense_config, data, "--global-batch-size", 7)
    assert said.startswith("Megatron refuses this configuration: ") and "7" in said


def test_folder_of_another_run(tmp_path: Path, dense_config: Path, data: Data) -> None:
    run = tmp_path / "run"
    decay = ("--lr-decay-iters", 6)
    first = train(run, dense_config, data, *decay, "--train-iters", 4).losses()
    config = (run / "config.yaml").read_text()
    said = complaint(run, dense_config, data, *decay, "--train-iters", 4, "--lr", 2e-3)
    assert str(run) in said and "lr was 0.001 and is 0.002" in said
    assert (run / "config.yaml").read_text() == config
    prolonged = ("--train-iters", 6, "--override-opt-param-scheduler", "--log-interval", 1)
    longer = train(run, dense_config, data, *decay, *prolonged)
    assert sorted(longer.losses()) == [1, 2, 3, 4, 5, 6]
    assert {i: loss for i, loss in longer.losses().items() if i <= 4} == first


def test_resolved_configuration_is_a_configuration(tmp_path: Path, dense_config: Path, data: Data) -> None:
    job = train(tmp_path / "run", dense_config, data, "--train-iters", 4, "--lr", 5e-4)
    again = train(tmp_path / "again", tmp_path / "run" / "config.yaml", data)
    assert again.losses() == job.losses()
