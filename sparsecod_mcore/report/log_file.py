"""Reading ``log.jsonl`` of a run that may be going on, or was killed."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

type Record = dict[str, Any]


@dataclass(frozen=True)
class Log:
    """What a run has logged so far."""

    steps: list[Record] = field(default_factory=list)  # a record per training step, in order
    validations: list[Record] = field(default_factory=list)
    damaged_lines: int = 0

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Tokens, and the figure called `key`, of the steps that have it."""
        known = [step for step in self.steps if step.get(key) is not None]
        return [step["tokens"] for step in known], [number(step[key]) for step in known]

    def seconds(self) -> float | None:
        """What the logged steps took, as far as speed was logged; without validation and saving."""
        return self._over_speeds(lambda record, steps: record["seconds_per_step"] * steps)

    def flops(self) -> float | None:
        """Floating-point operations of one device over the same steps."""
        return self._over_speeds(
            lambda record, steps: record["tflops_per_device"] * 1e12 * record["seconds_per_step"] * steps
        )

    def _over_speeds(self, amount: Any) -> float | None:
        total, since = 0.0, 0
        for record in self.steps:
            if "seconds_per_step" in record:
                total += amount(record, record["iteration"] - since)
                since = record["iteration"]
        return total if since else None

    def perplexity(self) -> float | None:
        """Of the last validation."""
        return number(self.validations[-1]["validation_perplexity"]) if self.validations else None


def read_log(path: Path) -> Log:
    """The log at `path`; empty where there is none. Lines that are damaged or half written are counted."""
    log, damaged = Log(), 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            iteration = record["iteration"]
            if not isinstance(iteration, int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            damaged += 1
            continue
        if "validation_perplexity" in record:
            log.validations.append(record)
        elif "tokens" in record:
            log.steps.append(record)
    return Log(log.steps, log.validations, damaged)


def number(value: Any) -> float:
    """A logged figure; those that JSON cannot hold stand in the log by name."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
