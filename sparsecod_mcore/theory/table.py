"""What was found, as a table: a row per check, with its most telling point."""

from sparsecod_mcore.report.tables import aligned
from sparsecod_mcore.theory.results import Check, Results

HEADINGS = ("theorem", "check", "claim", "not met", "at", "predicted", "measured ± interval", "verdict")


def theory_table(results: Results) -> str:
    """One row per check."""
    return aligned([list(HEADINGS), *map(row, results.checks)], left=True)


def by_chance(results: Results) -> str:
    """How many verdicts against claims that hold are to be expected."""
    random = [
        check
        for check in results.checks
        if check.kind == "law" and check.violated is None and any(point.low < point.high for point in check.points)
    ]
    expected = sum(1 - check.confidence for check in random)
    return (
        f"Laws checked with random figures: {len(random)}, of which {expected:.2g} fail by chance if all hold; "
        "another --seed or more --samples tell."
    )


def row(check: Check) -> list[str]:
    """Theorem, check, claim, assumption not met; of the telling point where, prediction, measurement; the verdict."""
    point = check.telling
    where = ", ".join(f"{name} {value:g}" for name, value in point.parameters.items())
    half = (point.high - point.low) / 2
    return [
        str(check.theorem),
        check.name,
        f"{check.claim} ({check.source})",
        check.violated or "",
        where,
        f"{point.predicted:.4g}",
        f"{point.measured:.4g} ± {half:.2g}",
        outcome(check),
    ]


def outcome(check: Check) -> str:
    """The verdict, and by how much."""
    factor = check.telling.factor
    if check.verdict == "holds as a bound":
        return f"{check.verdict}, up to {check.slack:.3g} times too large"
    if check.verdict in ("holds", "holds all the same"):
        return check.verdict
    return f"{check.verdict}: {factor:.3g} times the prediction"
