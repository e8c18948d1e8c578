"""The training line and ``log.jsonl``."""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsecod_mcore.monitor.statistics import LayerStatistics


@dataclass
class Throughput:
    """How fast training goes, over the steps since the last look; `peak_flops` is one device's peak in FLOP/s."""

    num_devices: int
    peak_flops: float | None
    _since: float = field(default_factory=time.perf_counter)
    _steps: int = 0
    _tokens: int = 0
    _flops: float = 0.0

    def add_step(self, tokens: int, flops: float) -> None:
        """Count a step that trained on `tokens` and took `flops` floating-point operations on all devices."""
        self._steps += 1
        self._tokens += tokens
        self._flops += flops

    def exclude(self, seconds: float) -> None:
        """Leave out `seconds` that were spent on something other than training."""
        self._since += seconds

    def measure(self) -> dict[str, float | None]:
        """Seconds per step, tokens/s, TFLOP/s and MFU (per device; None where the peak is unknown); starts anew."""
        seconds = time.perf_counter() - self._since
        flops = self._flops / seconds / self.num_devices
        measured = {
            "seconds_per_step": seconds / max(1, self._steps),
            "tokens_per_second": self._tokens / seconds,
            "tflops_per_device": flops / 1e12,
            "mfu": None if self.peak_flops is None else flops / self.peak_flops,
        }
        self._since, self._steps, self._tokens, self._flops = time.perf_counter(), 0, 0, 0.0
        return measured


class RunLog:
    """``log.jsonl``: one JSON object a line, each iteration once, whatever was killed and resumed."""

    def __init__(self, path: Path, resume_iteration: int) -> None:
        """Open the log, dropping records past `resume_iteration` and a half-written last line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if json.loads(line)["iteration"] <= resume_iteration]
        records = map(json.loads, kept)
        self.validated = {record["iteration"] for record in records if "validation_loss" in record}
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it must hold ``iteration``. Numbers that JSON cannot hold become their names."""
        self._file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")

    def flush(self) -> None:
        """Make the log durable up to here."""
        self._file.flush()
        os.fsync(self._file.fileno())


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return lines[:-1]  # what follows the last newline is empty, or was cut off


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def training_line(record: dict[str, Any], train_iters: int) -> str:
    """The line shown at every log interval."""
    mfu, variance = record["mfu"], record.get("last_layer_variance")
    remaining = (train_iters - record["iteration"]) * record["seconds_per_step"]
    parts = [
        f"step {record['iteration']:>{len(str(train_iters))}}/{train_iters}",
        f"loss {record['loss']:.4f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['tflops_per_device']:.3g} TFLOP/s",
        f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}",
        f"ETA {duration(remaining)}",
        f"variance of h_L {'not measured' if variance is None else f'{variance:.4g}'}",
    ]
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """h:mm:ss"""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def last_layer_variance(collected: dict[int, LayerStatistics], iteration: int) -> float | None:
    """Var(h_L) of the latest measured step up to `iteration`."""
    key = ("layer_output", "variance")
    latest = max((i for i, statistics in collected.items() if i <= iteration and key in statistics), default=None)
    return None if latest is None else collected[latest][key][-1].item()
