"""``tools/verify_theory.py``: check theorems, write what was found, and show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sparsecod_mcore import platform
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.progress import ProgressLine
from sparsecod_mcore.report.theory_figures import save_theory_figures
from sparsecod_mcore.scoring.provenance import package_versions
from sparsecod_mcore.theory import theorem1, theorem2, theorem3, theorem4, theorem5, theorem6
from sparsecod_mcore.theory.results import Check, Results, write_results
from sparsecod_mcore.theory.table import by_chance, theory_table

THEOREMS = {1: theorem1, 2: theorem2, 3: theorem3, 4: theorem4, 5: theorem5, 6: theorem6}
DEFAULT_SAMPLES = 10_000
LEAST_SAMPLES = 100  # for means of squares to be about normal


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to check, and on which model as well."""

    theorems: Sequence[int] = tuple(THEOREMS)
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    model: str | None = None
    data: str | None = None  # for the model; random tokens if there is none

    def __post_init__(self) -> None:
        """Raises `UserError` for what cannot be."""
        for number in self.theorems:
            if number not in THEOREMS:
                raise UserError(f"there is no theorem {number}; {', '.join(map(str, THEOREMS))} are")
        if self.samples < LEAST_SAMPLES:
            raise UserError(f"--samples {self.samples} is given, {LEAST_SAMPLES} or more is accepted")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is given, 0 or more is accepted")
        if self.data is not None and self.model is None:
            raise UserError("--data is for a model's tokens: --model is not given")


class _Progress(ProgressLine):
    """Tells how many checks are done."""

    def __init__(self) -> None:
        super().__init__("checking")
        self._done = 0

    def advance(self, share: float) -> None:
        self._done += 1
        self.show(share)

    def amounts(self, seconds: float) -> str:
        return f"{self._done} checks"


def verify(request: Request) -> Results:
    """Check the theorems. Raises `UserError` if the model or the data cannot be used."""
    checks: list[Check] = []
    compared = None
    if request.model is not None:  # nothing else needs Megatron, which takes its time to load
        platform.prepare()
        from sparsecod_mcore.theory.trained import Comparison

        compared = Comparison(request.model, request.data, request.seed)
    wanted = sorted(set(request.theorems))
    with _Progress() as progress:
        for index, number in enumerate(wanted):
            for check in THEOREMS[number].checks(request.samples, request.seed):
                checks.append(check)
                progress.advance((index + 0.5) / len(wanted))
        if compared is not None:
            for check in compared.checks():
                checks.append(check)
                progress.advance(1.0)
    return Results(
        seed=request.seed,
        samples=request.samples,
        versions=package_versions() | {"numpy": version("numpy")},
        model=request.model,
        model_sha256=None if compared is None else compared.model_sha256,
        data=request.data,
        data_sha256=None if compared is None else compared.data_sha256,
        checks=checks,
    )


def verify_into(folder: Path, request: Request) -> None:
    """Check, write theory.json and figures, and print a table."""
    results = verify(request)
    path = write_results(folder, results)
    figures = save_theory_figures(path, folder / "figures")
    print(f"{theory_table(results)}\n\n{by_chance(results)}\n{folder}: {path.name} and {len(figures)} figures")
