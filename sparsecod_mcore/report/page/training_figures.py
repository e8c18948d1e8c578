"""Figures of training: what a run's statistics and log say."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sparsecod_mcore.report.gather import Run
from sparsecod_mcore.report.page.charts import (
    Chart,
    Line,
    axis,
    bars,
    cell_ticks,
    colour_bar,
    heat_map,
    layer_lines,
    line_chart,
    run_line,
)
from sparsecod_mcore.report.page.figure import Figure, LegendItem, run_legend
from sparsecod_mcore.report.page.scales import Scale, layer_ticks, number, percent, tokens
from sparsecod_mcore.report.shares import PARTS, growth_of

_MAX_POINTS = 150  # of a line
_MAX_COLUMNS = 120  # of a heat map
_MAX_CELLS = 20_000  # of all heat maps of a figure
_WIDE_RATIO = 20.0  # between the largest and the smallest figure, from which an axis is logarithmic
_NO_STATISTICS = "train with cod.stats_interval above 0"

type Numbered = Sequence[tuple[int, Run]]  # runs by their place on the page, which gives their colour


def over_training(runs: Numbered) -> Figure:
    """Last-layer variance and loss of all runs on one axis."""
    figure = Figure(
        key="last-layer-variance",
        title="Last-layer variance over training",
        see=_compare_variance([run for _, run in runs]),
        legend=run_legend(runs),
        columns=("run", "quantity", "tokens", "value"),
        remedy=_NO_STATISTICS,
    )
    variances, losses = [], []
    for index, run in runs:
        series = run.series.get(("layer_output", "variance"))
        if series is None:
            figure.absent.append(run.name)
        else:
            variances.append(_curve(index, run, series.tokens_I, series.values_IL[:, -1]))
        curve = run.log.curve("loss")
        if curve[0]:
            losses.append(_curve(index, run, *map(np.array, curve)))
    for name, lines, logarithmic in (
        ("Last-layer variance", variances, True),
        ("Training loss, nats per token", losses, False),
    ):
        if lines:
            figure.charts.append(_tokens_chart(name, lines, logarithmic))
            figure.rows += [
                (line.name, name, at, value) for line in lines for at, value in zip(line.x, line.y, strict=True)
            ]
    if any(len(run.log.steps) > _MAX_POINTS for _, run in runs):
        figure.note = f"A point is the mean of consecutive steps, {_MAX_POINTS} points to a run at most."
    return figure


def _compare_variance(runs: Sequence[Run]) -> str:
    variances = [(run.last_layer_variance, run.name) for run in runs]
    known = sorted((value, name) for value, name in variances if value is not None and math.isfinite(value))
    if not known:
        return "How much the residual stream has grown when it leaves the last layer."
    if len(known) == 1:
        return (
            f"The stream leaves the last layer with a variance of {number(known[0][0])}; a steady climb means that "
            "depth only adds to it."
        )
    (low, lowest), (high, highest) = known[0], known[-1]
    times = f", {number(high / low)} times as much as" if low > 0 else ", more than"
    return (
        f"{highest} ends with a last-layer variance of {number(high)}{times} {lowest} ({number(low)}): lower curves "
        "leave late layers more to do."
    )


def _curve(index: int, run: Run, tokens_I: np.ndarray, values_I: np.ndarray) -> Line:
    ends, means_I = _blocks(values_I[:, None], _MAX_POINTS)
    return Line(run.name, tokens_I[ends].tolist(), means_I[:, 0].tolist(), **run_line(index))


def _blocks(values_IL: npt.NDArray[np.float64], most: int) -> tuple[np.ndarray, npt.NDArray[np.float64]]:
    """Means over at most so many blocks of consecutive rows, and the last row of each."""
    starts = np.unique(np.linspace(0, len(values_IL), min(len(values_IL), most), endpoint=False).astype(int))
    ends = np.append(starts[1:], len(values_IL)) - 1
    sums = np.add.reduceat(values_IL, starts, axis=0)
    return ends, sums / (ends - starts + 1)[:, None]


def _tokens_chart(name: str, lines: Sequence[Line], logarithmic: bool) -> Chart:
    x = Scale.of([at for line in lines for at in line.x], include=[0.0])
    y = Scale.of([value for line in lines for value in line.y], logarithmic=logarithmic)
    ends = "; ".join(f"{line.name} ends at {number(line.y[-1])}" for line in lines)
    return line_chart(
        lines, alt=f"{name} against training tokens: {ends}.", title=name, x_label="training tokens",
        y_label="", x=x, y=y, x_text=lambda at: f"{tokens(at)} tokens", x_ticks=axis(x, tokens),
    )  # fmt: skip


def variance_maps(runs: Numbered) -> Figure:
    """Variance of every layer's output over training, a heat map per run."""
    figure = _maps(runs, ("layer_output", "variance"), "variance", "variance of h after each layer")
    figure.key, figure.title = "variance-map", "Variance by layer over training"
    figure.see = "Depth goes upwards, training to the right: darkening towards the top is variance that layers pile up."
    return figure


def jacobian_maps(runs: Numbered) -> Figure:
    """Distance from the identity of every layer over training, a heat map per run."""
    figure = _maps(runs, ("jacobian", "deviation"), "‖J̄ − I‖ / D", "‖J̄ − I‖ / D of each layer")
    figure.key, figure.title = "jacobian-map", "Distance of each layer from the identity over training"
    figure.see = (
        "Light cells are layers whose Jacobian is close to the identity: what enters them leaves them unchanged."
    )
    figure.remedy = "train with cod.jacobian_interval above 0"
    return figure


def _maps(runs: Numbered, key: tuple[str, str], what: str, label: str) -> Figure:
    having = [(run, run.series[key]) for _, run in runs if key in run.series]
    figure = Figure(key="", title="", see="", columns=("run", "tokens", "layer", what), remedy=_NO_STATISTICS)
    figure.absent = [run.name for _, run in runs if key not in run.series]
    if not having:
        return figure
    columns = min(_MAX_COLUMNS, max(2, _MAX_CELLS // sum(series.values_IL.shape[1] for _, series in having)))
    shown = [(run, series.tokens_I, *_blocks(series.values_IL, columns)) for run, series in having]
    colours = Scale.of((value for *_, means in shown for value in means.ravel().tolist()), logarithmic=True)
    figure.colour_bar = colour_bar(colours, label)
    for run, tokens_I, ends, means_IL in shown:
        count, num_layers = means_IL.shape
        at = [tokens(float(seen)) for seen in tokens_I[ends]]
        some = np.unique(np.linspace(0, count - 1, min(3, count)).round().astype(int)).tolist()
        layers = [f"layer {layer}" for layer in range(num_layers)]
        last = ", ".join(map(number, means_IL[-1].tolist()))
        figure.charts.append(
            heat_map(
                means_IL.T[::-1], colours=colours, title=run.name, is_run_title=True,
                alt=f"{what} of {run.name} by layer over training; at the end, first layer to last: {last}.",
                x_label="training tokens", y_label="layer", row_texts=layers[::-1],
                column_texts=[f"{text} tokens" for text in at], x_ticks=cell_ticks(count, some, at),
                y_ticks=cell_ticks(num_layers, layer_ticks(num_layers, 6), list(map(str, range(num_layers)))),
            )
        )  # fmt: skip
        figure.rows += [
            (run.name, int(tokens_I[end]), layer, value)
            for end, row in zip(ends, means_IL.tolist(), strict=True)
            for layer, value in enumerate(row)
        ]
    return figure


def growth_parts(runs: Numbered) -> Figure:
    """Which part of each add the variance grows by, from the covariance split."""
    figure = Figure(
        key="growth",
        title="What the variance grows by",
        see="Bars of a run add up to 100 %, its growth from embedding to last layer: what branches add by themselves, "
        "and what they gain by pointing where the shortcut already points (2 Cov).",
        legend=[LegendItem(name, f"part-{place}", shape="bar") for place, name in enumerate(PARTS)],
        columns=("run", "layer", *PARTS),
        remedy=_NO_STATISTICS,
    )
    found = [(run, growth_of(run)) for _, run in runs]
    figure.absent = [run.name for run, growth in found if growth is None]
    shares = [(run, growth.shares_PL) for run, growth in found if growth is not None]
    if not shares:
        return figure
    extremes = [np.sum(side, axis=0) for _, s in shares for side in (np.clip(s, 0, None), np.clip(s, None, 0))]
    y = Scale.of(np.concatenate(extremes).tolist(), include=[0.0])
    for run, shares_PL in shares:
        lines = [
            Line(name, range(len(row)), row, f"part-{place}", texts=list(map(percent, row)))
            for place, (name, row) in enumerate(zip(PARTS, shares_PL.tolist(), strict=True))
        ]
        totals = "; ".join(
            f"{name} {percent(total)}" for name, total in zip(PARTS, shares_PL.sum(axis=1).tolist(), strict=True)
        )
        figure.charts.append(
            bars(
                lines, shares_PL.shape[1], y=y, y_text=percent, title=run.name, is_run_title=True,
                alt=f"Shares of the growth of variance in {run.name}, over all layers: {totals}.",
                x_label="layer", y_label="share of growth",
            )
        )  # fmt: skip
        figure.rows += [(run.name, layer, *parts) for layer, parts in enumerate(shares_PL.T.tolist())]
    return figure


def by_depth(
    runs: Numbered, values: Sequence[np.ndarray | None], *, key: str, title: str, see: str, y_label: str, remedy: str
) -> Figure:
    """One figure per layer of every run, on one axis."""
    figure = Figure(key=key, title=title, see=see, columns=("run", "layer", y_label), remedy=remedy)
    having = [
        (index, run, found.tolist()) for (index, run), found in zip(runs, values, strict=True) if found is not None
    ]
    figure.absent = [run.name for (_, run), found in zip(runs, values, strict=True) if found is None]
    figure.legend = run_legend((index, run) for index, run, _ in having)
    lines = [Line(run.name, range(len(row)), row, **run_line(index)) for index, run, row in having]
    every = np.array([value for *_, row in having for value in row])
    positive = every[np.isfinite(every) & (every > 0)]
    if not positive.size:
        return figure
    y = Scale.of(every, logarithmic=bool(positive.max() > _WIDE_RATIO * positive.min()))
    said = "; ".join(
        f"{run.name} from {number(row[0])} in the first layer to {number(row[-1])} in the last"
        for _, run, row in having
    )
    figure.charts = [
        layer_lines(lines, max(map(len, (line.y for line in lines))), y=y, alt=f"{title}: {said}.", y_label=y_label)
    ]
    figure.rows = [(run.name, layer, value) for _, run, row in having for layer, value in enumerate(row)]
    return figure


def variance_by_depth(runs: Numbered) -> Figure:
    """The end of the heat maps, all runs on one axis."""
    return by_depth(
        runs, [run.at_end("layer_output", "variance") for _, run in runs], key="variance-depth",
        title="Variance against depth at the end of training", y_label="variance", remedy=_NO_STATISTICS,
        see="Growth by the same factor in every layer is a straight rise where the axis is logarithmic, and one that "
        "bends upwards where it is not; a flat end is a stream that late layers hardly add to.",
    )  # fmt: skip


def kurtosis_by_depth(runs: Numbered) -> Figure:
    """Layer kurtosis (Eq. 20), of training or of scoring."""

    def of(run: Run) -> np.ndarray | None:
        if ("layer_output", "dimension_kurtosis") in run.series:
            return run.series["layer_output", "dimension_kurtosis"].values_IL[-1]
        moments = None if run.scores is None else run.scores.moments
        values = None if moments is None else moments.streams["layer_output"].get("dimension_kurtosis")
        return None if values is None else np.array(values)

    return by_depth(
        runs, [of(run) for _, run in runs], key="kurtosis", title="Kurtosis by layer", y_label="kurtosis",
        see="3 is a normal distribution; peaks are layers whose dimensions hold outliers, which few tokens carry.",
        remedy="train with cod.kurtosis_interval above 0, or tools/measure_sparsity.py --what moments",
    )  # fmt: skip
