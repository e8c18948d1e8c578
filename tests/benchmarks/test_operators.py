"""The benchmark runner: every entry runs, on shapes small enough for a test; failures of peers are told, not hidden."""

import dataclasses
import json

import pytest
import torch

from benchmarks import operators
from benchmarks.cases import BENCHMARKS, EAGER, OURS, Benchmark, Way
from benchmarks.measure import Peaks, Spread, machine, time_in_turn

PEAKS = Peaks(1e10, 1e11)
SMALL = {
    "flash_attention_jvp": (1, 2, 1, 16, 32),
    "attention_stats": (1, 2, 1, 16, 32),
    "probe_moments": (2, 5, 32),
    "count_below": (1, 16),
}


def small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "MAX_SETS", 2)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.operator)
def test_every_entry_runs(benchmark, monkeypatch):
    small_inputs(monkeypatch)
    shape = SMALL.get(benchmark.operator, (7, 32))
    rows = list(operators.rows_of(benchmark, shape, torch.float32, "cpu", PEAKS, 0.0, compiled=False))
    assert [row["way"] for row in rows][:2] == [OURS, EAGER]
    for row in rows:
        assert "failed" not in row, row
        assert 0 < row["seconds"]["20%"] <= row["seconds"]["50%"] <= row["seconds"]["80%"]
        peak = 1e11 / 1e12 if benchmark.in_flops else 1e10 / 1e9
        rate = row["tflop_per_s" if benchmark.in_flops else "gb_per_s"]
        assert row["share_of_peak"] == pytest.approx(rate / peak)
        assert row["operator"] in operators.line(row)
    assert rows[0]["times_ours"] == 1


def test_a_peer_that_fails_is_left_out_with_its_reason(monkeypatch):
    small_inputs(monkeypatch)

    def refuse(*inputs: object) -> None:
        raise NotImplementedError("no such shape\nand more")

    benchmark: Benchmark = dataclasses.replace(BENCHMARKS[0], others=lambda device: {"peer": Way(refuse)})
    rows = list(operators.rows_of(benchmark, (7, 32), torch.float32, "cpu", PEAKS, 0.0, compiled=False))
    assert [row["way"] for row in rows] == ["peer", OURS, EAGER]
    assert rows[0]["failed"] == "NotImplementedError: no such shape"
    assert "failed: NotImplementedError" in operators.line(rows[0])


def test_ways_take_turns_on_rotating_inputs():
    seen: list[tuple[str, int]] = []
    ways = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(3)] for name in ("a", "b")}
    times = time_in_turn(ways, "cpu", 0.0)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 10, "b": 10}
    timed = seen[6:]  # after each input once
    for r in range(10):
        assert sorted(timed[2 * r : 2 * r + 2]) == [("a", r % 3), ("b", r % 3)]


def test_spread():
    assert Spread.of([float(i) for i in range(101)]) == Spread(20, 50, 80)


def test_the_result_says_where_it_was_measured(tmp_path, monkeypatch):
    small_inputs(monkeypatch)
    few = dataclasses.replace(BENCHMARKS[0], cpu_shapes=((7, 32),), cpu_dtypes=(torch.float32,))
    monkeypatch.setattr(operators, "measure_peaks", lambda device, seconds: PEAKS)
    result = json.loads(json.dumps(operators.run("cpu", [few], 0.0, compiled=False)))
    assert result["torch"] == machine("cpu")["torch"] and result["date"] and result["device"].startswith("CPU")
    assert result["copy_gb_per_s"] == 10 and len(result["rows"]) == 4


def test_cuda_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["operators.py", "--device", "cuda"])
    assert operators.main() == 2
    assert capsys.readouterr().err == "error: --device cuda was given, but PyTorch finds no CUDA device\n"
