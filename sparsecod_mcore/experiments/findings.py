"""Answers to the paper's questions as text and figures: the trend found beside the trend published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.experiments.questions import QUESTIONS, Question
from sparsecod_mcore.experiments.trends import SIGNIFICANT, BySeed, Finding, judge
from sparsecod_mcore.report.style import STYLE, save

_SMALLEST_P = 1e-12  # below it rounding speaks: seeds that agree in every digit
_CROWDED = 30  # letters of all labels, which then are turned
_LOGARITHMIC = 20.0  # a measure whose largest mean is that many times the smallest is drawn on a logarithmic axis
LEGEND = (
    f"yes: the published direction, p < {SIGNIFICANT}; no: the opposite, p < {SIGNIFICANT}; otherwise the seeds do not "
    "tell. p is of each comparison alone: of twenty without any difference, one falls below."
)


@dataclass(frozen=True)
class Answer:
    """One question, its measures by value and seed, and what they say of each trend."""

    question: Question
    measured: Mapping[str, BySeed]  # by measure
    findings: Sequence[Finding]


def answer_of(question: Question, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Answer:
    """Judge every trend of a question from the rows (of `collect`) of each of its values."""
    measures = dict.fromkeys(trend.measure for trend in question.trends)
    measured = {
        measure: {label: [row[measure] for row in group if row[measure] is not None] for label, group in rows.items()}
        for measure in measures
    }
    return Answer(question, measured, [judge(trend, measured[trend.measure]) for trend in question.trends])


def table_of(answer: Answer) -> str:
    """Two Markdown tables: means and standard deviations over seeds, and trends."""
    seeds = max(len(sample) for by_value in answer.measured.values() for sample in by_value.values())
    lines = [
        f"## {answer.question.name}: {answer.question.asks}",
        "",
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds != 1 else ''}.",
        "",
        f"| | {' | '.join(answer.measured)} |",
        f"|{'---|' * (1 + len(answer.measured))}",
    ]
    for label in answer.question.runs:
        cells = (_spread(by_value[label]) for by_value in answer.measured.values())
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| measure | published | found | p | shown |", "|---|---|---|---|---|"]
    for finding in answer.findings:
        trend = finding.trend
        over = "" if trend.over is None else f" ({' → '.join(trend.over)})"
        at = "" if trend.at is None else f" at {trend.at}"
        p = "" if finding.p is None else f"{finding.p:.2g}" if finding.p >= _SMALLEST_P else f"< {_SMALLEST_P:.0e}"
        published = f"{trend.direction}{at}: {trend.published}"
        lines.append(f"| {trend.measure}{over} | {published} | {finding.found} | {p} | {finding.verdict} |")
    return "\n".join(lines)


def _spread(sample: Sequence[float]) -> str:
    if not sample:
        return "n/a"
    return f"{fmean(sample):.4g} ± {stdev(sample):.2g}" if len(sample) > 1 else f"{sample[0]:.4g}"


def save_answer(answer: Answer, title: str, commands: str, folder: Path) -> Path:
    """Write an answer with its figure and the shell's `commands` that lead to it.

    Returns report.md, which is all answers of `folder` in the questions' order.
    """
    make_folder(folder)
    name = answer.question.name
    _figure(answer, folder / name)
    text = f"{table_of(answer)}\n\n![{name}]({name}.png)\n\n```bash\n{commands}\n```\n"
    write_atomically(folder / f"{name}.md", text.encode())
    parts = [folder / f"{other}.md" for other in QUESTIONS if (folder / f"{other}.md").exists()]
    report = folder / "report.md"
    text = "\n".join([f"# {title}\n\n{LEGEND}\n", *(part.read_text() for part in parts)])
    write_atomically(report, text.encode())
    return report


def _figure(answer: Answer, stem: Path) -> None:
    """Every measure against the question's values: a dot to a seed, a line through the means."""
    measured = answer.measured
    with mpl.rc_context(STYLE):
        columns = min(3, len(measured))
        lines = -(-len(measured) // columns)
        figure = Figure(figsize=(3.4 * columns, 2.6 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for axes, (measure, by_value) in zip(panels, measured.items(), strict=False):
            present = {place: sample for place, sample in enumerate(by_value.values()) if sample}
            means = [fmean(sample) for sample in present.values()]
            axes.plot(list(present), means, color="#0072B2")
            for place, sample in present.items():
                axes.plot([place] * len(sample), sample, "o", color="#222222", markersize=3)
            if means and min(means) > 0 and max(means) > _LOGARITHMIC * min(means):
                axes.set_yscale("log")
            axes.set(title=measure.replace("_", " "), xticks=range(len(by_value)))
            crowded = sum(map(len, by_value)) > _CROWDED
            axes.set_xticklabels(list(by_value), **({"rotation": 20, "ha": "right"} if crowded else {}))
        for axes in list(figure.axes)[len(measured) :]:
            axes.set_visible(False)
        save(figure, stem)
