"""Figures of scores: which layers work, and what models are at rest."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sparsecod_mcore.report.gather import Run
from sparsecod_mcore.report.page.charts import (
    Line,
    Tick,
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
from sparsecod_mcore.report.page.scales import Scale, layer_ticks, number, percent
from sparsecod_mcore.report.page.training_figures import Numbered, by_depth
from sparsecod_mcore.scoring.results import SPARSITY_THRESHOLDS, USEFUL_INCREASE, Matrix, Scores

_SCORE = "tools/score_layers.py --scores {}"
_SMALLEST_INCREASE = 1e-3  # where bars of usefulness begin
_SPARSITY_SHOWN = 1e-3  # ε of attention's sparsity by layer
_MATRIX_LAYERS = 4  # whose Jacobians are shown
_MATRIX_CELLS = 48  # a side


def usefulness(runs: Numbered) -> Figure:
    """How much the loss rises when a linear map stands in for each layer."""
    figure = Figure(
        key="usefulness",
        title="Usefulness of each layer",
        see=f"Pale bars stay below the line of {percent(USEFUL_INCREASE)} and are layers that a linear map replaces: "
        + "; ".join(_effective(run) for _, run in runs if run.scores is not None and run.scores.effective_depth)
        + ".",
        legend=[
            LegendItem("map fitted on the scored sequences", "ink", shape="bar"),
            LegendItem("map fitted on other sequences", "ink", shape="level"),
        ],
        columns=("run", "layer", "fit", "relative increase of the loss"),
        remedy=_SCORE.format("usefulness,effective_depth"),
        note=f"The axis is logarithmic and begins at {percent(_SMALLEST_INCREASE)}; smaller increases have no bar.",
    )
    having = [(index, run, fits) for index, run in runs if (fits := _fits(run))]
    figure.absent = [run.name for _, run in runs if not _fits(run)]
    if not having:
        return figure
    y = Scale.of(
        [value for *_, fits in having for fit in fits.values() for value in fit if value > _SMALLEST_INCREASE],
        logarithmic=True,
        include=[_SMALLEST_INCREASE, 0.2],
    )
    for index, run, fits in having:
        colours = (run_line(index)["colour"], "ink")
        scored, *held_out = (
            Line(name, range(len(fit)), fit, colour, texts=list(map(percent, fit)))
            for (name, fit), colour in zip(fits.items(), colours, strict=False)
        )
        figure.charts.append(
            bars(
                [scored], len(scored.y), y=y, y_text=percent, threshold=USEFUL_INCREASE, levels=held_out,
                title=run.name, is_run_title=True, x_label="layer", y_label="rise of the loss",
                alt=f"Rise of the loss of {run.name} with a linear map in each layer's place, first to last: "
                f"{', '.join(scored.texts)}.",
            )
        )  # fmt: skip
        figure.rows += [(run.name, at, name, value) for name, fit in fits.items() for at, value in enumerate(fit)]
    return figure


def _effective(run: Run) -> str:
    assert run.scores is not None and run.scores.effective_depth is not None
    return f"{run.name} has {run.scores.effective_depth.effective} of {run.scores.layers} layers above it"


def _fits(run: Run) -> dict[str, list[float]]:
    found = None if run.scores is None else run.scores.usefulness
    if found is None:
        return {}
    held_out = {} if found.held_out is None else {"other sequences": found.held_out.relative_loss_increase}
    return {"scored sequences": found.scored.relative_loss_increase} | held_out


def causal(runs: Numbered) -> Figure:
    return _pairs(
        runs, lambda scores: scores.causal, "causal", "Causal effect of each layer on later ones",
        "Row s, column l: how much what layer l adds changes when layer s is skipped; light rows are layers that no "
        "later one needs.",
        ("layer affected", "layer skipped"), "relative change of what a layer adds",
    )  # fmt: skip


def permutation(runs: Numbered) -> Figure:
    return _pairs(
        runs, lambda scores: scores.permutation, "permutation", "Loss when two layers change places",
        "Light cells are pairs of layers that can be swapped with little harm: they do much the same, or nothing.",
        ("swapped with layer", "layer"), "relative change of the loss",
    )  # fmt: skip


def _pairs(
    runs: Numbered,
    section: Callable[[Scores], object],
    key: str,
    title: str,
    see: str,
    labels: tuple[str, str],
    colour_label: str,
) -> Figure:
    """Heat maps of pairs i < j: row i, column j; row L − 1 and column 0 hold none and are left out."""
    figure = Figure(
        key=key,
        title=title,
        see=f"{see} Beside each name its mean over pairs.",
        columns=("run", "layer", "other layer", colour_label),
        remedy=_SCORE.format(key),
    )
    having: list[tuple[Run, float, npt.NDArray[np.float64]]] = []
    for _, run in runs:
        found = None if run.scores is None else section(run.scores)
        if run.scores is None or found is None or run.scores.layers == 1:
            figure.absent.append(run.name)
        else:
            having.append((run, found.score, _upper(found.matrix)))  # type: ignore[attr-defined]
    if not having:
        return figure
    every = np.concatenate([values.ravel() for *_, values in having])
    figure.colour_bar = colour_bar(colours := Scale.of(every, include=[0.0]), colour_label)
    for run, score, values_LL in having:
        count = len(values_LL)
        layers = [str(layer) for layer in range(count + 1)]
        some = layer_ticks(count, 6)
        figure.charts.append(
            heat_map(
                values_LL, colours=colours, title=f"{run.name}: {number(score)}", is_run_title=True,
                shape="square", alt=f"{title}, {run.name}: {number(score)} on average, over {count + 1} layers.",
                x_label=labels[0], y_label=labels[1], row_texts=[f"{labels[1]} {at}" for at in layers[:-1]],
                column_texts=[f"{labels[0]} {at}" for at in layers[1:]], x_ticks=cell_ticks(count, some, layers[1:]),
                y_ticks=cell_ticks(count, some, layers, downwards=True),
            )
        )  # fmt: skip
        figure.rows += [
            (run.name, i, j + 1, float(value)) for (i, j), value in np.ndenumerate(values_LL) if not math.isnan(value)
        ]
    return figure


def _upper(matrix: Matrix) -> npt.NDArray[np.float64]:
    values_LL = np.array(matrix)
    return np.where(np.triu(np.ones_like(values_LL, dtype=bool), 1), values_LL, np.nan)[:-1, 1:]


def jacobian_by_depth(runs: Numbered) -> Figure:
    def of(run: Run) -> np.ndarray | None:
        if run.scores is not None and run.scores.jacobian is not None:
            return np.array([layer.deviation for layer in run.scores.jacobian.layers])
        return run.at_end("jacobian", "deviation")

    return by_depth(
        runs, [of(run) for _, run in runs], key="jacobian-depth", title="Distance from the identity by layer",
        y_label="‖J̄ − I‖ / D", see="The lower a layer lies, the less it does to what passes through it.",
        remedy=_SCORE.format("jacobian"),
    )  # fmt: skip


def jacobian_matrices(runs: Numbered) -> Figure:
    """Token-averaged Jacobians of some layers, each cell the largest entry of a block."""
    figure = Figure(
        key="jacobian-matrices",
        title="Jacobians of some layers",
        see="J̄ − I: a blank square is a layer that passes its input on; a dark diagonal one that scales it; "
        "texture off the diagonal one that mixes dimensions.",
        columns=("run", "layer", "norm off the diagonal", "mean of the diagonal", "its standard deviation"),
        remedy=_SCORE.format("jacobian") + " --jacobian all",
    )
    shown = []
    for _, run in runs:
        layers = [] if run.scores is None or run.scores.jacobian is None else run.scores.jacobian.layers
        exact = [(layer, found) for layer, found in enumerate(layers) if found.matrix is not None]
        if not exact:
            figure.absent.append(run.name)
        for place in np.unique(np.linspace(0, len(exact) - 1, _MATRIX_LAYERS).round().astype(int)) if exact else ():
            layer, found = exact[place]
            shown.append((run, layer, _coarse(np.array(found.matrix))))
        figure.rows += [
            (run.name, at, found.off_diagonal or math.nan, found.diagonal_mean, found.diagonal_std or math.nan)
            for at, found in exact
        ]
    if not shown:
        return figure
    most = max(float(np.nanquantile(np.abs(cells), 0.995)) for *_, cells in shown) or 1.0
    figure.colour_bar = colour_bar(colours := Scale(-most, most), "entry of J̄ − I", diverging=True)
    for run, layer, cells_DD in shown:
        side = len(cells_DD)
        names = [str(at) for at in range(side)]
        figure.charts.append(
            heat_map(
                cells_DD, colours=colours, diverging=True, digits=2, shape="square",
                title=f"{run.name}, layer {layer}", is_run_title=True,
                alt=f"J̄ − I of layer {layer} of {run.name}, {side} by {side} blocks; its numbers are in the CSV.",
                x_label="input", y_label="output", row_texts=[f"output block {at}" for at in names],
                column_texts=[f"input block {at}" for at in names], x_ticks=[], y_ticks=[],
            )
        )  # fmt: skip
    return figure


def _coarse(matrix_DD: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """J̄ − I with the entry of largest magnitude of each block, so that a thin diagonal is not averaged away."""
    deviation_DD = matrix_DD - np.eye(len(matrix_DD))
    block = -(-len(deviation_DD) // _MATRIX_CELLS)
    side = -(-len(deviation_DD) // block)
    padded = np.zeros((side * block, side * block))
    padded[: len(deviation_DD), : len(deviation_DD)] = deviation_DD
    blocks = padded.reshape(side, block, side, block).swapaxes(1, 2).reshape(side, side, -1)
    return np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]


def sparsity(runs: Numbered) -> Figure:
    """Small weights, small attention, and how spread attention is."""
    figure = Figure(
        key="sparsity",
        title="Sparsity of weights and attention, and entropy",
        see="Higher curves are sparser, and lower entropy is attention on fewer tokens; the paper finds that both go "
        "with layers that work.",
        columns=("run", "quantity", "at", "value"),
        remedy="tools/measure_sparsity.py",
    )
    weights, below, entropy = [], [], []
    for index, run in runs:
        scores = run.scores
        if scores is None or (scores.weight_sparsity is None and scores.attention is None):
            figure.absent.append(run.name)
            continue
        if scores.weight_sparsity is not None:
            model = scores.weight_sparsity.model
            weights.append(
                _line(index, run, SPARSITY_THRESHOLDS, [model[str(at)] for at in SPARSITY_THRESHOLDS], percent)
            )
        if scores.attention is not None and scores.attention.lengths:
            attention = scores.attention.lengths[max(scores.attention.lengths, key=int)]
            layers = range(scores.layers)
            below.append(_line(index, run, layers, attention.sparsity_causal[str(_SPARSITY_SHOWN)], percent))
            entropy.append(_line(index, run, layers, attention.entropy, number))
    figure.legend = run_legend((index, run) for index, run in runs if run.name not in figure.absent)
    depth = max((run.scores.layers for _, run in runs if run.scores is not None), default=1)
    if weights:
        name = "Share of weights below ε"
        x = Scale(SPARSITY_THRESHOLDS[0] / 1.3, SPARSITY_THRESHOLDS[-1] * 1.3, logarithmic=True)
        figure.charts.append(
            line_chart(
                weights, alt=_said(name, weights), title=name, x_label="ε", y_label="", x=x,
                y=Scale.of([v for line in weights for v in line.y], logarithmic=True), y_text=percent,
                x_text=lambda at: f"below {at:g}", x_ticks=axis(x, lambda at: f"{at:.0e}".replace("e-0", "e−")),
            )
        )  # fmt: skip
    for name, lines, text in (
        (f"Share of visible attention below {_SPARSITY_SHOWN:g}", below, percent),
        ("Entropy of attention, nats", entropy, number),
    ):
        if lines:
            y = Scale.of([value for line in lines for value in line.y])
            figure.charts.append(
                layer_lines(lines, depth, y=y, alt=_said(name, lines), y_label="", title=name, y_text=text)
            )
    for chart, lines in zip(figure.charts, filter(None, (weights, below, entropy)), strict=True):
        figure.rows += [(line.name, chart.title, at, v) for line in lines for at, v in zip(line.x, line.y, strict=True)]
    return figure


def _line(index: int, run: Run, x: Sequence[float], y: Sequence[float], text: Callable[[float], str]) -> Line:
    return Line(run.name, x, y, **run_line(index), texts=[text(value) for value in y])


def _said(name: str, lines: Sequence[Line]) -> str:
    return (
        f"{name}: " + "; ".join(f"{line.name} from {number(line.y[0])} to {number(line.y[-1])}" for line in lines) + "."
    )


def experts(runs: Numbered) -> Figure:
    """How evenly routers use their experts."""
    figure = Figure(
        key="experts",
        title="Balance of experts",
        see="Even rows are routers that use all experts; a dark cell is an expert that gets most of the tokens. Beside "
        "each name the mean over layers of the balance, 1 − std / mean.",
        columns=("run", "layer", "expert", "share of choices"),
        remedy=_SCORE.format("moe") + " (of a mixture of experts)",
    )
    having = [(run, run.scores.moe.layers) for _, run in runs if run.scores is not None and run.scores.moe is not None]
    if not having:
        return figure
    every = [share for _, layers in having for found in layers.values() for share in found.selection_frequency]
    figure.colour_bar = colour_bar(colours := Scale.of(every, include=[0.0]), "share of a router's choices")
    for run, layers in having:
        numbers = sorted(map(int, layers))
        shares_LE = np.array([layers[str(layer)].selection_frequency for layer in numbers])
        balance = [layers[str(layer)].balance for layer in numbers]
        count = shares_LE.shape[1]
        names = [str(expert) for expert in range(count)]
        rows: list[Tick] = cell_ticks(len(numbers), layer_ticks(len(numbers), 6), list(map(str, numbers)))
        figure.charts.append(
            heat_map(
                shares_LE[::-1], colours=colours, is_run_title=True,
                title=f"{run.name}: {number(float(np.mean(balance)))}",
                alt=f"How often {run.name} selects each expert; balance by layer: {', '.join(map(number, balance))}.",
                x_label="expert", y_label="layer",
                row_texts=[f"layer {at}, balance {number(b)}" for at, b in zip(numbers, balance, strict=True)][::-1],
                column_texts=[f"expert {name}" for name in names],
                x_ticks=cell_ticks(count, layer_ticks(count), names), y_ticks=rows,
            )
        )  # fmt: skip
        figure.rows += [(run.name, numbers[at], e, float(value)) for (at, e), value in np.ndenumerate(shares_LE)]
    return figure
