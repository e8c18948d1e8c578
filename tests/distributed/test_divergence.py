"""A run whose numbers stop being finite stops, and says in which layer and stream that began."""

from pathlib import Path

import pytest

from tests.distributed.jobs import Data
from tests.distributed.programs import train_around

pytestmark = pytest.mark.distributed

POISON = """
def around(iteration, model, layers, run):
    for layer in layers:
        if iteration == 2 and layer.layer_number - 1 == {layer}:
            layer.get_submodule("{module}").weight.data[0, 0] = float("inf")
    return run()
"""


@pytest.mark.parametrize(
    ("module", "layer", "stream", "flags", "processes"),
    [
        ("mlp.linear_fc2", 2, "mlp", (), 1),
        ("self_attention.linear_proj", 3, "attention", ("--pipeline-model-parallel-size", 2), 2),
        ("mlp.linear_fc2", 1, "mlp", ("--clip-grad", 0.0), 1),
    ],
)
def test_names_the_first_layer_and_stream(
    module: str, layer: int, stream: str, flags: tuple, processes: int,
    tmp_path: Path, dense_config: Path, data: Data,
) -> None:  # fmt: skip
    poison = POISON.format(module=module, layer=layer)
    job = train_around(poison, tmp_path, dense_config, data, *flags, "--save-interval", 2, processes=processes)
    assert job.returncode == 1
    said = job.complaint()
    assert "iteration 3" in said and f"layer {layer}, stream {stream} " in said
    assert [path.name for path in (job.run / "checkpoints").glob("iter_*")] == ["iter_0000002"]
    counts = {key: value for key, value in job.statistics().items() if key[3] == "non_finite" and value}
    assert min(counts)[:2] == (3, layer)
    assert sorted(job.losses()) == [1, 2, 3]


# The gradient of one step is spoilt, on one data-parallel rank: all of them have to agree that it is skipped.
SPOILT = """
import torch.distributed as dist

def around(iteration, model, layers, run):
    weight = layers[0].mlp.linear_fc2.weight
    spoil = iteration in {steps} and dist.get_rank() == 0
    handle = weight.register_hook(lambda gradient: gradient * float("nan")) if spoil else None
    result = run()
    if spoil:
        handle.remove()
    return result
"""


@pytest.mark.parametrize(
    "processes", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["one_process", "distributed_optimizer"]
)
def test_skipped_steps_change_nothing(processes: int, tmp_path: Path, dense_config: Path, data: Data) -> None:
    """Steps 3 and 4 of 6 are skipped: they leave the weights, and the run ends as if it had not seen their data."""
    optimizer = ("--use-distributed-optimizer",) if processes > 1 else ()
    flags = (*optimizer, "--cod-skip-non-finite", 2, "--log-interval", 1, "--cod-jacobian-interval", 0)
    job = train_around(SPOILT.format(steps="(2, 3)"), tmp_path, dense_config, data, *flags, processes=processes)
    assert job.returncode == 0, job.errors[-3000:]
    warnings = [line for line in job.output.splitlines() if line.startswith("warning: ")]
    assert [line.split(",")[0] for line in warnings] == [
        "warning: step 3 is skipped (1 of 2 in a row)",
        "warning: step 4 is skipped (2 of 2 in a row)",
    ]
    assert all("began in the output layer, the loss or the backward pass" in line for line in warnings)
    records = {record["iteration"]: record for record in job.records() if "loss" in record}
    assert [i for i, record in records.items() if record.get("skipped")] == [3, 4]
    rates = [records[i]["learning_rate"] for i in range(1, 7)]
    assert rates[2] == rates[3] == rates[1] != rates[4], "the schedule does not move on either"
    assert records[5]["grad_norm"] > 0 and records[6]["loss"] < records[1]["loss"]


def test_more_than_may_be_skipped_stops(tmp_path: Path, dense_config: Path, data: Data) -> None:
    flags = ("--cod-skip-non-finite", 1, "--save-interval", 2)
    job = train_around(SPOILT.format(steps="(2, 3)"), tmp_path, dense_config, data, *flags)
    assert job.returncode == 1
    assert job.complaint().startswith("loss or gradients are not finite at iteration 4: ")
    assert "warning: step 3 is skipped (1 of 1 in a row)" in job.output
    assert [path.name for path in (job.run / "checkpoints").glob("iter_*")] == ["iter_0000002"]
