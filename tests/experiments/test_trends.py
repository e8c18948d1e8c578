"""A trend is seen where seeds tell, denied where they tell the opposite, and left open where they do not."""

from pathlib import Path

import pytest

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.experiments.findings import answer_of, save_answer, table_of
from sparsecod_mcore.experiments.measures import MEASURES
from sparsecod_mcore.experiments.questions import QUESTIONS, Trend, question_of
from sparsecod_mcore.experiments.sizes import SIZES, size_of
from sparsecod_mcore.experiments.trends import judge

FALLS = Trend("last_layer_variance", "falls", "falls")
HIGHEST = Trend("causal", "highest", "in the middle", at="b")


@pytest.mark.parametrize(
    ("trend", "values", "found", "verdict"),
    [
        (FALLS, {"a": [9, 10, 11], "b": [5, 6, 5.5], "c": [1, 2, 1.5]}, "falls", "yes"),
        (FALLS, {"a": [1, 1.2, 0.9], "b": [5, 6, 5.5], "c": [20, 22, 19]}, "rises", "no"),
        (FALLS, {"a": [9, 1, 5], "b": [1, 9, 5], "c": [5, 5.5, 1]}, "no clear trend", "not at this size"),
        (FALLS, {"a": [9, 10, 11], "b": [1, 2, 1.5]}, "falls", "yes"),
        (FALLS, {"a": [2, 2, 2], "b": [2, 2, 2]}, "the same everywhere", "not at this size"),
        (FALLS, {"a": [9, 10], "b": [], "c": [1, 2]}, "no number at b", "not measured"),
        (FALLS, {"a": [2], "b": [1]}, "too few runs to tell", "not at this size"),
        (HIGHEST, {"a": [1, 1.1, 0.9], "b": [3, 3.1, 2.9], "c": [2, 2.1, 1.9]}, "highest at b", "yes"),
        (HIGHEST, {"a": [1, 1.1, 0.9], "b": [3, 3.1, 2.9], "c": [5, 5.1, 4.9]}, "higher at the last value", "no"),
        (HIGHEST, {"a": [1, 5, 3], "b": [3, 3.1, 2.9], "c": [2, 2.1, 1.9]}, "b does not differ", "not at this size"),
        (HIGHEST, {"a": [1], "b": [3], "c": [2]}, "b does not differ", "not at this size"),
    ],
)
def test_verdicts(trend: Trend, values: dict[str, list[float]], found: str, verdict: str) -> None:
    finding = judge(trend, values)
    assert finding.found.startswith(found) and finding.verdict == verdict
    assert finding.p is None or 0 <= finding.p <= 1


def test_two_values_are_judged_by_the_t_test() -> None:
    """t = 2.4495 at 4 degrees of freedom: p = 0.0705 (from tables); a line through two places is that test."""
    finding = judge(Trend("causal", "rises", ""), {"a": [0.0, 1.0, 2.0], "b": [2.0, 3.0, 4.0]})
    assert finding.p == pytest.approx(0.0705, abs=5e-5) and finding.verdict == "not at this size"


def test_a_trend_may_be_over_some_values_only() -> None:
    values = {"a": [1.0, 1.1], "b": [0.1, 0.2], "c": [3.0, 3.1], "d": [6.0, 6.1]}
    assert judge(Trend("causal", "rises", "", over=("b", "c", "d")), values).verdict == "yes"


def test_questions_name_measures_and_values_that_exist() -> None:
    for size in SIZES.values():
        for name in QUESTIONS:
            question = question_of(name, size)
            for trend in question.trends:
                assert trend.measure in MEASURES
                assert set(trend.over or ()) | {trend.at or next(iter(question.runs))} <= set(question.runs)
            assert all(run.recipe.max_positions >= question.score_length for run in question.runs.values())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"did you mean 'micro'"):
        size_of("mikro")
    with pytest.raises(UserError, match=r"did you mean 'weight_decay'"):
        question_of("weightdecay", SIZES["micro"])


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    question = question_of("mixture_of_experts", SIZES["micro"])
    nothing = dict.fromkeys(MEASURES, None)
    rows = {
        label: [nothing | {"last_layer_variance": base + seed, "perplexity": 20.0} for seed in range(3)]
        for label, base in (("dense", 50.0), ("MoE", 5.0))
    }
    unmeasured = {label: [nothing] for label in ("4", "8", "16")}
    answer = answer_of(question, rows)
    report = save_answer(answer, "At size micro", "make it", tmp_path).read_text()
    save_answer(
        answer_of(question_of("depth_control", SIZES["micro"]), unmeasured), "At size micro", "make it", tmp_path
    )
    assert report.startswith("# At size micro") and table_of(answer) in report and "```bash\nmake it\n```" in report
    both = (tmp_path / "report.md").read_text()
    assert both.index("## depth_control") < both.index("## mixture_of_experts")
    assert "| dense | 51 ± 1 | 20 ± 0 | n/a | n/a | n/a |" in report
    assert "| last_layer_variance | falls: to a third (1B active), to a sixth (400M active) | falls |" in report
    assert "| causal | rises: 0.31 → 0.34 | no number at dense, MoE |  | not measured |" in report
    assert (tmp_path / "mixture_of_experts.png").stat().st_size > 10_000
