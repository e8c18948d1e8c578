"""A full disk and a W&B that hangs: training says so, and loses nothing that was saved."""

import time
from pathlib import Path

import pytest

from tests.distributed.jobs import Data, train
from tests.distributed.programs import train_around

pytestmark = pytest.mark.distributed

# From step 6 on no file may grow past 1 MiB: a disk that is full for checkpoints, and to be had without being root.
FULL_DISK = """
import resource

def around(iteration, model, layers, run):
    if iteration == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    return run()
"""


@pytest.mark.parametrize("saving", [(), ("--async-save",)], ids=["at_once", "in_the_background"])
def test_full_disk(saving: tuple, tmp_path: Path, dense_config: Path, data: Data) -> None:
    """The save at step 6 fails; that of step 4 stays what it was, and what is gone on from."""
    flags = ("--train-iters", 8, "--save-interval", 2, "--log-interval", 1, "--cod-jacobian-interval", 0)
    job = train_around(FULL_DISK, tmp_path, dense_config, data, *flags, *saving)
    assert job.returncode == 1, job.errors[-3000:]
    said = job.complaint()
    assert said.startswith("the checkpoint could not be saved (") and "GB are free in" in said
    assert "at iteration 6; the checkpoint of iteration 4 is untouched" in said
    assert (job.run / "checkpoints" / "iter_0000006").exists(), "what was written of it"
    resumed = train(tmp_path, dense_config, data, *flags)
    assert "step 5/8" in resumed.output and "step 4/8" not in resumed.output
    assert sorted(resumed.losses()) == list(range(1, 9))


def test_wandb_that_hangs(tmp_path: Path, dense_config: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call to it would wait for ever; the run ends in its own time, with exit code 0."""
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    began = time.monotonic()
    job = train(
        tmp_path, dense_config, data,
        "--wandb-project", "tests", "--wandb-exp-name", "hung", "--cod-jacobian-interval", 0, wandb="dead_wandb",
    )  # fmt: skip
    assert time.monotonic() - began < 120
    assert sorted(job.losses()) == [1, 2, 3, 4, 5, 6]
    assert "warning: W&B was not done in time; `wandb sync` sends what is kept" in job.output
