"""What checking a theorem found, and the file it is kept in: theory.json."""
# ruff: noqa: RUF009  axes declares fields

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.data.json_file import read_json
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.scoring.schema import Malformed, axes, check, decode, encode

SCHEMA_VERSION = 1
FILE = "theory.json"
_ROUNDING = 1e-9  # relative; what is not random at all has an interval of no width

type Verdict = Literal["holds", "holds as a bound", "fails", "assumption bites", "holds all the same"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Prediction and measurement at one choice of parameters, with a confidence interval of the latter."""

    parameters: dict[str, float] = axes("parameter")
    predicted: float
    measured: float
    low: float
    high: float
    exact: float | None = None  # what mathematics gives for what was simulated, where that is another figure

    @property
    def factor(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted

    @property
    def is_covered(self) -> bool:
        """Whether the measurement cannot be told from the prediction."""
        return self.is_within and self.predicted <= self.high + _ROUNDING * abs(self.high)

    @property
    def is_within(self) -> bool:
        """Whether the measurement cannot be told from what the prediction bounds from above."""
        return self.low <= self.predicted + _ROUNDING * abs(self.predicted)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim, measured at several points. Confidence is of all the points of a check together."""

    theorem: int = axes(low=1, high=6)
    name: str
    claim: str
    source: str  # an equation or a section of the paper, or "here"
    kind: Literal["law", "bound"]  # whether the measurement is to equal the prediction or not to exceed it
    violated: str | None = None  # which assumption does not hold; None where all do
    varied: str  # the parameter that figures have on their axis
    confidence: float = axes(low=0.0, high=1.0)
    points: list[Point]

    @property
    def verdict(self) -> Verdict:
        """What the points say of the claim."""
        if self.kind == "bound":
            if all(point.is_within for point in self.points):
                return "holds as a bound"
        elif all(point.is_covered for point in self.points):
            return "holds" if self.violated is None else "holds all the same"
        return "fails" if self.violated is None else "assumption bites"

    @property
    def telling(self) -> Point:
        """The point where the measurement is furthest from the law, or closest to (or furthest above) the bound."""
        if self.kind == "bound":
            return max(self.points, key=lambda point: point.factor)
        return max(self.points, key=lambda point: abs(math.log(max(point.factor, 1e-300))))

    @property
    def slack(self) -> float:
        """How many times too large a bound is where it is loosest."""
        return max(1 / point.factor for point in self.points)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All checks of one run, and what they depend on."""

    schema_version: int = SCHEMA_VERSION
    seed: int
    samples: int = axes(low=2)
    versions: dict[str, str]
    model: str | None = None
    model_sha256: str | None = None
    data: str | None = None
    data_sha256: str | None = None
    checks: list[Check]


def write_results(folder: Path, results: Results) -> Path:
    """Write theory.json, wholly or not at all. Equal results give equal bytes."""
    check(results)
    make_folder(folder)
    write_atomically(folder / FILE, encode(results))
    return folder / FILE


def read_results(path: Path) -> Results:
    """Read and check a file of `write_results`. Raises `UserError` if it is not there or something else."""
    content = read_json(path)
    if content.get("schema_version") != SCHEMA_VERSION:
        found = content.get("schema_version")
        raise UserError(f"{path} holds no checks of theory of schema {SCHEMA_VERSION} (its schema_version: {found})")
    try:
        results = decode(Results, content)
        check(results)
    except Malformed as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return results
