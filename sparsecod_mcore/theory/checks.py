"""From simulations to checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsecod_mcore.theory.monte_carlo import Draw, Estimate, estimate, generator
from sparsecod_mcore.theory.results import Check, Point

CONFIDENCE = 0.99  # of all points of a check together


@dataclass(frozen=True)
class Case:
    """What is predicted for one choice of parameters, and how samples of it are drawn, whose mean is to be compared."""

    parameters: Mapping[str, float]
    predicted: float
    draw: Draw
    exact: float | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed; fields as those of `Check`."""

    theorem: int
    name: str
    claim: str
    source: str = "here"
    kind: Literal["law", "bound"] = "law"
    violated: str | None = None
    varied: str

    def check(self, cases: Sequence[Case], samples: int, seed: int) -> Check:
        """Measure `cases`, each by `samples` draws."""
        estimates = [
            estimate(case.draw, samples, generator(seed, self.theorem, self.name, index))
            for index, case in enumerate(cases)
        ]
        return self.judge(cases, estimates)

    def judge(self, cases: Sequence[Case], estimates: Sequence[Estimate]) -> Check:
        """The check of what was measured of `cases`. Each interval is as wide as all of them together need it."""
        confidence = 1 - (1 - CONFIDENCE) / len(cases)
        points = []
        for case, measured in zip(cases, estimates, strict=True):
            low, high = measured.interval(confidence)
            points.append(
                Point(
                    parameters={name: float(value) for name, value in case.parameters.items()},
                    predicted=float(case.predicted),
                    measured=measured.mean,
                    low=low,
                    high=high,
                    exact=None if case.exact is None else float(case.exact),
                )
            )
        return Check(
            theorem=self.theorem,
            name=self.name,
            claim=self.claim,
            source=self.source,
            kind=self.kind,
            violated=self.violated,
            varied=self.varied,
            confidence=CONFIDENCE,
            points=points,
        )
