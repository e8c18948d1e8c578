"""The log keeps each iteration once; the line shows what is known."""

import json
import math
from pathlib import Path

import torch

from sparsecod_mcore.train.progress import RunLog, Throughput, duration, last_layer_variance, training_line


def test_resuming_drops_later_records_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, 0)
    for iteration in range(1, 6):
        log.append({"iteration": iteration, "loss": 1.0 / 3.0})
    log.flush()
    with path.open("a") as file:
        file.write('{"iteration": 6, "lo')
    resumed = RunLog(path, 3)
    resumed.append({"iteration": 4, "loss": math.nan})
    resumed.flush()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert records[0]["loss"] == 1.0 / 3.0, "losses are kept to the last bit"
    assert records[3]["loss"] == "nan"


def test_throughput_leaves_out_what_is_not_training() -> None:
    throughput = Throughput(num_devices=2, peak_flops=1e12)
    throughput._since -= 7.0  # seven seconds ago
    throughput.exclude(5.0)
    throughput.add_step(60, 3e12)
    throughput.add_step(140, 5e12)
    measured = throughput.measure()
    assert math.isclose(measured["seconds_per_step"], 1.0, rel_tol=1e-2)
    assert math.isclose(measured["tokens_per_second"], 100.0, rel_tol=1e-2)
    assert math.isclose(measured["tflops_per_device"], 2.0, rel_tol=1e-2)
    assert math.isclose(measured["mfu"], 2.0, rel_tol=1e-2)


def test_training_line() -> None:
    record = {"iteration": 5, "loss": 2.5, "tokens_per_second": 1234.5, "tflops_per_device": 0.05, "mfu": None}
    line = training_line(record | {"seconds_per_step": 2.0, "last_layer_variance": 12.25}, 100)
    assert line == (
        "step   5/100 | loss 2.5000 | 1,234 tokens/s | 0.05 TFLOP/s | MFU n/a | ETA 0:03:10 | variance of h_L 12.25"
    )
    assert "MFU 41.0%" in training_line(record | {"mfu": 0.41, "seconds_per_step": 2.0}, 100)
    assert "not measured" in training_line(record | {"seconds_per_step": 2.0}, 100)
    assert duration(3723.4) == "1:02:03"


def test_last_layer_variance_is_of_the_latest_step_that_measured_it() -> None:
    measured = {("layer_output", "variance"): torch.tensor([1.0, 2.0])}
    probed = {("jacobian", "deviation"): torch.tensor([0.5, 0.5])}
    collected = {2: measured, 3: probed, 4: {("layer_output", "variance"): torch.tensor([3.0, 4.0])}}
    assert last_layer_variance(collected, 3) == 2.0
    assert last_layer_variance({3: probed}, 3) is None
