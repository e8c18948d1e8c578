"""Figures of checked theorems, from their file alone: measurements with their intervals.

Predictions are dashed; what mathematics gives for what was simulated, where that is something else, is dotted.
"""

import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsecod_mcore.report.style import EVEN_COLOURS, STYLE, save
from sparsecod_mcore.theory.results import Check, Point, read_results

COLUMNS = 3
_COLOUR_OF = {"holds": "#009E73", "holds as a bound": "#009E73", "holds all the same": "#009E73"}
_OTHERWISE = "#D55E00"


def save_theory_figures(results_file: Path, output_folder: Path) -> list[Path]:
    """Draw each theorem that `results_file` holds, a panel per check. Returns the files written, png and svg.

    Raises UserError where the file is no file of checks.
    """
    results = read_results(results_file)
    written = []
    for theorem in sorted({check.theorem for check in results.checks}):
        with mpl.rc_context(STYLE):
            figure = _figure([check for check in results.checks if check.theorem == theorem])
            written += save(figure, output_folder / f"theorem{theorem}")
    return written


def _figure(checks: list[Check]) -> Figure:
    columns = min(COLUMNS, len(checks))
    rows = -(-len(checks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, check in zip(panels, checks, strict=False):
        _draw(panel, check)
    for panel in panels[len(checks) :]:
        panel.set_visible(False)
    return figure


def _draw(panel: Axes, check: Check) -> None:
    series: dict[str, list[Point]] = {}
    for point in check.points:
        others = [f"{name} {value:g}" for name, value in point.parameters.items() if name != check.varied]
        series.setdefault(", ".join(others), []).append(point)
    for index, (label, points) in enumerate(series.items()):
        colour = EVEN_COLOURS(index / max(len(series) - 1, 1) if len(series) > 1 else 1.0)
        x = [point.parameters[check.varied] for point in points]
        panel.plot(x, [point.predicted for point in points], color=colour, linestyle="--", linewidth=1.2)
        exact = [math.nan if point.exact is None else point.exact for point in points]
        panel.plot(x, exact, color=colour, linestyle=":", linewidth=1.2)
        measured = [point.measured for point in points]
        below = [max(point.measured - point.low, 0.0) for point in points]
        above = [max(point.high - point.measured, 0.0) for point in points]
        panel.errorbar(
            x, measured, (below, above), color=colour, linestyle="none", marker="o", capsize=2.5, label=label or None
        )
    panel.set_title(f"{check.name}: {check.verdict}", color=_COLOUR_OF.get(check.verdict, _OTHERWISE), fontsize=9)
    panel.set(xlabel=check.varied.replace("_", " "), ylabel="measured (dashed: predicted)")
    figures = [value for point in check.points for value in (point.predicted, point.measured)]
    if min(figures) > 0 and max(figures) / min(figures) > 10:
        panel.set_yscale("log")
    positions = sorted({point.parameters[check.varied] for point in check.points})
    if positions[0] > 0 and positions[-1] / positions[0] > 10 and check.varied != "layer":
        panel.set_xscale("log", base=2 if all(math.log2(x).is_integer() for x in positions) else 10)
    if any(series):
        panel.legend(fontsize=7.5)
