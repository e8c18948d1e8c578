"""A killed run goes on as if nothing had happened; a damaged checkpoint is named and passed over."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.jobs import Data, Job, command, environment, train

pytestmark = pytest.mark.distributed

# Dropout makes the random state part of what a resume has to restore.
FLAGS = ("--train-iters", 14, "--save-interval", 8, "--log-interval", 1, "--hidden-dropout", 0.1, "--eval-interval", 4)
INTEGRITY = ("--verify-integrity",)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dense_config: Path, data: Data) -> Job:
    return train(tmp_path_factory.mktemp("uninterrupted"), dense_config, data, *FLAGS)


def test_kill_9_then_the_same_command(tmp_path: Path, uninterrupted: Job, dense_config: Path, data: Data) -> None:
    """Killed past a checkpoint, between two saves: rows past it were written and are dropped, none is missing."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(run, dense_config, data, *FLAGS), env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        # Its line is printed before its record is written: the step before it has left both.
        if line.startswith("step 10/"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    killed = Job(run, process.returncode, "", "")
    assert 9 <= max(killed.losses()) < 14, "not killed between two saves"
    resumed = train(run, dense_config, data, *FLAGS)
    assert "step  9/14" in resumed.output and "step  8/14" not in resumed.output
    assert resumed.losses() == uninterrupted.losses()
    assert resumed.statistics() == uninterrupted.statistics()
    iterations = [record["iteration"] for record in resumed.records() if "loss" in record]
    assert iterations == list(range(1, 15))
    validated = [record["iteration"] for record in resumed.records() if "validation_loss" in record]
    assert validated == [4, 8, 12, 14]


def test_sigterm_saves_and_the_same_command_goes_on(
    tmp_path: Path, uninterrupted: Job, dense_config: Path, data: Data
) -> None:
    """As a scheduler stops a container: the signal goes to the entry point, which started torchrun."""
    run = tmp_path / "run"
    words = command(run, dense_config, data, *FLAGS)
    launch = [words[0], "-m", "sparsecod_mcore.cluster.launch", *words[1:]]
    env = environment() | {"SPARSECOD_PROCESSES_PER_NODE": "1", "SPARSECOD_HEARTBEAT": str(tmp_path / "heartbeat")}
    job = subprocess.Popen(launch, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None
    said = ""
    for line in job.stdout:
        said += line
        if line.startswith("step  3/"):
            job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors[-3000:]
    stopped = re.search(r"^stopped at step (\d+), as asked, and saved; the same command goes on from here$", said, re.M)
    assert stopped is not None and 3 <= int(stopped[1]) < 8, said
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == stopped[1]
    assert time.time() - (tmp_path / "heartbeat").stat().st_mtime < 60
    resumed = train(run, dense_config, data, *FLAGS)
    assert resumed.losses() == uninterrupted.losses()
    assert resumed.statistics() == uninterrupted.statistics()


def test_distributed_optimizer_resumes(tmp_path: Path, dense_config: Path, data: Data) -> None:
    """Without Transformer Engine or Apex the state of torch's AdamW survives, at two data-parallel ranks."""
    flags = (*FLAGS, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
    whole = train(tmp_path / "whole", dense_config, data, *flags, processes=2)
    train(tmp_path / "parts", dense_config, data, *flags, "--exit-interval", 8, processes=2)
    assert train(tmp_path / "parts", dense_config, data, *flags, processes=2).losses() == whole.losses()


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("damage", "extra"), [(_flip_byte, INTEGRITY), (_cut_short, ())])
def test_damaged_checkpoint_gives_way_to_an_older_one(
    damage, extra: tuple, tmp_path: Path, uninterrupted: Job, dense_config: Path, data: Data
) -> None:
    run = tmp_path / "run"
    train(run, dense_config, data, *FLAGS, *extra, "--exit-interval", 9)
    damaged = run / "checkpoints" / "iter_0000009" / "__0_0.distcp"
    damage(damaged)
    job = train(run, dense_config, data, *FLAGS, *extra)
    [warning] = [line for line in job.output.splitlines() if line.startswith("warning: ")]
    assert str(damaged) in warning and "iteration 8 instead" in warning
    assert job.losses() == uninterrupted.losses()


def test_no_whole_checkpoint_is_an_error_that_loses_nothing(tmp_path: Path, dense_config: Path, data: Data) -> None:
    run = tmp_path / "run"
    before = train(run, dense_config, data, *FLAGS, "--exit-interval", 3)
    [damaged] = (run / "checkpoints").glob("*/__0_0.distcp")
    _cut_short(damaged)
    job = train(run, dense_config, data, *FLAGS, ok=False)
    assert job.returncode == 2
    assert str(damaged) in job.complaint()
    assert job.losses() == before.losses()


def test_a_checkpoint_in_the_making_is_not_picked_up(
    tmp_path: Path, uninterrupted: Job, dense_config: Path, data: Data
) -> None:
    """A folder newer than Megatron's tracker was never finished."""
    run = tmp_path / "run"
    train(run, dense_config, data, *FLAGS, "--exit-interval", 4)
    unfinished = run / "checkpoints" / "iter_0000008"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    assert train(run, dense_config, data, *FLAGS).losses() == uninterrupted.losses()


def test_a_finished_run_is_left_alone(uninterrupted: Job, dense_config: Path, data: Data) -> None:
    log = (uninterrupted.run / "log.jsonl").read_text()
    began = time.time()
    train(uninterrupted.run, dense_config, data, *FLAGS)
    assert (uninterrupted.run / "log.jsonl").read_text() == log
    assert not [path for path in (uninterrupted.run / "stats").iterdir() if path.stat().st_mtime > began]
    assert json.loads(log.splitlines()[-1])["validation_perplexity"] > 1
