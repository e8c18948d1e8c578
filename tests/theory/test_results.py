"""theory.json: what is written is read again, what is damaged is refused; tables and figures come of it alone."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.report.theory_figures import save_theory_figures
from sparsecod_mcore.theory.results import Check, Point, Results, read_results, write_results
from sparsecod_mcore.theory.run import Request, verify, verify_into
from sparsecod_mcore.theory.table import outcome, theory_table

TOOL = Path(__file__).parents[2] / "tools" / "verify_theory.py"


@pytest.fixture(scope="module")
def results() -> Results:
    return verify(Request(theorems=(6, 3), samples=200, seed=1))


def test_what_is_written_is_read_again(results: Results, tmp_path: Path) -> None:
    assert [check.theorem for check in results.checks] == sorted(check.theorem for check in results.checks)
    path = write_results(tmp_path / "a", results)
    assert read_results(path) == results
    assert write_results(tmp_path / "b", read_results(path)).read_bytes() == path.read_bytes()
    assert write_results(tmp_path / "c", verify(Request(theorems=(3, 6), samples=200, seed=1))).read_bytes() == (
        path.read_bytes()
    )
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["theory.json"]


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda c: c.update(schema_version=9), "of schema 1 (its schema_version: 9)"),
    "unknown": (lambda c: c["checks"][0].update(sorce="x"), "unknown entry 'sorce' (did you mean 'source'?)"),
    "missing": (lambda c: c["checks"][1]["points"][0].pop("low"), "lacks 'low'"),
    "theorem": (lambda c: c["checks"][0].update(theorem=7), "theorem is 7, not from 1 to 6"),
    "kind": (lambda c: c["checks"][0].update(kind="guess"), "kind is 'guess', not one of 'law', 'bound'"),
    "type": (lambda c: c["checks"][0]["points"][0].update(measured="1"), "measured is '1', not a number"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_malformed_files_are_refused(mistake: str, results: Results, tmp_path: Path) -> None:
    spoil, complaint = MISTAKES[mistake]
    path = write_results(tmp_path, results)
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_results(path)
    assert complaint in str(caught.value) and str(path) in str(caught.value)


def check_of(kind: Any, violated: str | None, *factors: float) -> Check:
    """A prediction of 1, measured as `factors` ± 10 %."""
    return Check(
        theorem=1, name="n", claim="c", source="here", kind=kind, violated=violated, varied="x", confidence=0.99,
        points=[
            Point(parameters={"x": i}, predicted=1.0, measured=f, low=0.9 * f, high=1.1 * f)
            for i, f in enumerate(factors)
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (check_of("law", None, 1.05, 0.95), "holds"),
        (check_of("law", None, 1.0, 1.2), "fails: 1.2 times the prediction"),
        (check_of("law", None, 1.0, 0.5), "fails: 0.5 times the prediction"),
        (check_of("law", "a", 1.0, 1.05), "holds all the same"),
        (check_of("law", "a", 1.05, 20.0, 0.2), "assumption bites: 20 times the prediction"),
        (check_of("bound", None, 0.01, 1.05), "holds as a bound, up to 100 times too large"),
        (check_of("bound", None, 0.01, 1.2), "fails: 1.2 times the prediction"),
        (check_of("bound", "a", 0.5, 0.5), "holds as a bound, up to 2 times too large"),
        (check_of("bound", "a", 0.01, 3.0), "assumption bites: 3 times the prediction"),
    ],
)
def test_verdicts_of_points(check: Check, verdict: str) -> None:
    assert outcome(check) == verdict


def test_a_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify_into(tmp_path, Request(theorems=[5], samples=150))
    printed = capsys.readouterr().out
    results = read_results(tmp_path / "theory.json")
    assert theory_table(results) in printed
    assert re.search(r"Laws checked with random figures: [1-9], of which 0\.0[1-9] fail by chance", printed)
    heading, _, *rows = theory_table(results).splitlines()
    assert len(rows) == len(results.checks) and heading.split()[:2] == ["theorem", "check"]
    assert "outputs of heads are independent" in rows[3] and "times the prediction" in rows[3]
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == ["theorem5.png", "theorem5.svg"]
    again = save_theory_figures(tmp_path / "theory.json", tmp_path / "again")
    assert [path.read_bytes() for path in again] == [(tmp_path / "figures" / path.name).read_bytes() for path in again]


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"theorems": [1, 7]}, "there is no theorem 7; 1, 2, 3, 4, 5, 6 are"),
        ({"samples": 99}, "--samples 99 is given, 100 or more is accepted"),
        ({"seed": -1}, "--seed -1 is given, 0 or more is accepted"),
        ({"data": "tokens.npy"}, "--data is for a model's tokens: --model is not given"),
    ],
)
def test_what_cannot_be_is_refused(request_: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        Request(**request_)
    assert str(caught.value) == complaint


def test_the_command_line_complains_in_one_sentence(tmp_path: Path) -> None:
    words = [sys.executable, str(TOOL), "--theorems", "one", "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=TOOL.parents[1], env={"PYTHONPATH": "."})
    assert done.returncode == 2
    assert done.stderr.startswith("error: argument --theorems: 'one' is given, numbers such as 1,3 are accepted")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
