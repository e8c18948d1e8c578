"""TensorBoard and W&B get the curves, and validation perplexity the log."""

import gzip
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.jobs import Data, train

pytestmark = pytest.mark.distributed


def test_tensorboard_and_wandb(tmp_path: Path, dense_config: Path, data: Data) -> None:
    flags = ("--wandb-project", "tests", "--wandb-exp-name", "writers", "--full-validation", "--log-interval", 2)
    job = train(tmp_path, dense_config, data, *flags, wandb="")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    statistics = job.statistics()
    for tag, layer, stream in (
        ("variance/last_layer", 3, "layer_output"),
        ("variance/layer_output/layer_003", 3, "layer_output"),
        ("variance/attention/layer_000", 0, "attention"),
    ):
        curve = {event.step: event.value for event in events.Scalars(tag)}
        assert sorted(curve) == list(range(1, 7))
        for iteration, value in curve.items():
            assert value == pytest.approx(statistics[iteration, layer, stream, "variance"], rel=1e-6)
    losses = {event.step: event.value for event in events.Scalars("lm loss")}
    assert losses == pytest.approx(job.losses(), rel=1e-6)
    [offline] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = offline.read_bytes()
    assert (
        b"variance/last_layer" in content and b"variance/mlp/layer_002" in content and b"by_layer/variance" in content
    )
    assert "W&B" not in job.output, "nothing failed on the way"


def test_log(tmp_path: Path, dense_config: Path, data: Data) -> None:
    job = train(tmp_path, dense_config, data, "--full-validation", "--eval-interval", 3, "--cod-stats-interval", 2)
    steps = [record for record in job.records() if "loss" in record]
    assert [step["tokens"] for step in steps] == [8 * 64 * iteration for iteration in range(1, 7)]
    variance = [step["last_layer_variance"] for step in steps]
    statistics = job.statistics()
    measured = [statistics.get((i, 3, "layer_output", "variance")) for i in range(1, 7)]
    assert measured[1::2] == variance[1::2] and None not in measured[1::2] and measured[::2] == [None] * 3
    validations = [record for record in job.records() if "validation_loss" in record]
    assert [record["iteration"] for record in validations] == [3, 6]
    assert "validation at step 6: loss" in job.output and "MFU n/a" in job.output


def test_profile(tmp_path: Path, dense_config: Path, data: Data) -> None:
    """torch's profiler sees ranges named by layer and sub-module, and its summary what the statistics take."""
    flags = ("--cod-profile", "torch", "--profile-step-start", 3, "--profile-step-end", 5)
    job = train(tmp_path, dense_config, data, *flags)
    [summary] = [line for line in job.output.splitlines() if line.endswith("in this project's statistics")]
    share = float(summary.split("all, ")[1].split("%")[0])
    assert 0 < share < 100
    table = (tmp_path / "torch_profile" / "rank-0.txt").read_text()
    assert summary in table and "aten::" in table
    with gzip.open(tmp_path / "torch_profile" / "rank-0.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"layer_000", "layer_003/self_attention", "layer_002/mlp.linear_fc1"} <= names
    assert any(str(name).startswith("sparsecod::residual_add_moments") for name in names)
