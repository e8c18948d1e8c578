"""Figures of a model's scores, from their file alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparsecod_mcore.report.style import EVEN_COLOURS, STYLE, layers_shown, mark_every, save
from sparsecod_mcore.scoring.results import USEFUL_INCREASE, Fit, Jacobian, Matrix, Scores, read_scores

# Colours of Okabe and Ito, which remain distinct to colour-blind readers.
BLUE, ORANGE, VERMILION, BLACK, GREY = "#0072B2", "#E69F00", "#D55E00", "#222222", "#b8b8b8"
MARKERS = "osD^vPXp"
DEVIATION = r"$\|\bar{J} - I\|_F\,/\,d$"
LARGE_INCREASE = 2.0
MAX_CELLS_WITH_NUMBERS = 12  # a side
MAX_JACOBIAN_CELLS = 128  # a side


def save_score_figures(scores_file: Path, output_folder: Path) -> list[Path]:
    """Draw what `scores_file` holds, a figure per score; see `FIGURES`. Returns the files written, png and svg.

    Raises UserError where the file is no file of scores.
    """
    scores = read_scores(scores_file)
    written = []
    for name, draw in FIGURES.items():
        with mpl.rc_context(STYLE):
            figure = draw(scores)
            if figure is not None:
                written += save(figure, output_folder / name)
    return written


def _causal(scores: Scores) -> Figure | None:
    if scores.causal is None or scores.layers == 1:
        return None
    title = f"Causal effect of skipping a layer: {scores.causal.score:.3f} on average"
    return _heat_map(
        scores.causal.matrix, title, ("layer affected", "layer skipped"), "relative change of what it adds"
    )


def _permutation(scores: Scores) -> Figure | None:
    if scores.permutation is None or scores.layers == 1:
        return None
    title = f"Swapping two layers: loss +{scores.permutation.score:.0%} on average"
    return _heat_map(scores.permutation.matrix, title, ("swapped with layer", "layer"), "relative change of the loss")


def _heat_map(matrix: Matrix, title: str, axis_labels: tuple[str, str], colour_label: str) -> Figure:
    """Pairs (i, j), i < j: row i, column j."""
    values_LL = np.array(matrix)
    num_layers = len(values_LL)
    shown_LL = np.ma.masked_invalid(np.where(np.triu(np.ones_like(values_LL, dtype=bool), 1), values_LL, np.nan))
    # Row 0 to column 0 hold no pair.
    shown_LL = shown_LL[:-1, 1:]
    figure = Figure(figsize=(6.2, 5), layout="constrained")
    axes = figure.subplots()
    colours = Normalize(0, shown_LL.max() or 1) if shown_LL.count() else Normalize(0, 1)
    axes.pcolormesh(
        np.arange(1, num_layers + 1) - 0.5,
        np.arange(num_layers) - 0.5,
        shown_LL,
        cmap=EVEN_COLOURS,
        norm=colours,
        edgecolors="white",
        linewidth=2 if num_layers <= MAX_CELLS_WITH_NUMBERS else 0,
    )
    if num_layers <= MAX_CELLS_WITH_NUMBERS:
        _write_numbers(axes, shown_LL, colours)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(title=title, xlabel=axis_labels[0], ylabel=axis_labels[1], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=MAX_CELLS_WITH_NUMBERS, integer=True))
    bar = figure.colorbar(ScalarMappable(colours, EVEN_COLOURS), ax=axes, label=colour_label, shrink=0.85)
    bar.outline.set_visible(False)
    return figure


def _write_numbers(axes: Axes, values_LL: np.ma.MaskedArray, colours: Normalize) -> None:
    for (row, column), value in np.ndenumerate(values_LL):
        if not np.ma.is_masked(values_LL[row, column]):
            is_dark = colours(value) > 0.45
            axes.text(
                column + 1, row, f"{value:.2f}", ha="center", va="center", color="white" if is_dark else BLACK, size=8.5
            )


def _usefulness(scores: Scores) -> Figure | None:
    if scores.usefulness is None:
        return None
    fits = {"fitted on the sequences scored": scores.usefulness.scored}
    if scores.usefulness.held_out is not None:
        fits["fitted on other sequences"] = scores.usefulness.held_out
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_layer, over_thresholds = figure.subplots(1, 2, width_ratios=[1.7, 1])
    _draw_increases(by_layer, fits, scores.layers)
    _draw_effective_layers(over_thresholds, fits, scores.layers)
    _legend_below(by_layer)
    if max(fit.sorted_increases[0] for fit in fits.values()) > LARGE_INCREASE:  # beside which the rest would vanish
        by_layer.set_yscale("symlog", linthresh=USEFUL_INCREASE)
        over_thresholds.set_xscale("symlog", linthresh=USEFUL_INCREASE)
    for axis in (by_layer.yaxis, over_thresholds.xaxis):
        axis.set_major_formatter(FuncFormatter(lambda increase, _: f"{100 * increase:g}%"))
    return figure


def _draw_increases(axes: Axes, fits: dict[str, Fit], num_layers: int) -> None:
    width = 0.8 / len(fits)
    for place, (label, fit) in enumerate(fits.items()):
        position_L = np.arange(num_layers) + (place - (len(fits) - 1) / 2) * width
        axes.bar(position_L, fit.relative_loss_increase, width * 0.94, label=label, color=(BLUE, ORANGE)[place])
    axes.axhline(USEFUL_INCREASE, color=VERMILION, linestyle="--", linewidth=1.3, label=f"{USEFUL_INCREASE:.0%}")
    effective = round(next(iter(fits.values())).score * num_layers)
    axes.set(
        title=f"Loss with a layer replaced by a linear map: {effective} of {num_layers} layers are effective",
        ylabel="increase of the loss",
    )
    axes.grid(False, axis="x")
    _count_layers(axes, num_layers)


def _draw_effective_layers(axes: Axes, fits: dict[str, Fit], num_layers: int) -> None:
    """The number of layers above every threshold: the increases themselves, sorted, turned on their side."""
    for place, fit in enumerate(fits.values()):
        increases_L = np.maximum(fit.sorted_increases, 0)
        axes.step(
            np.concatenate([increases_L, [0]]),
            np.arange(num_layers + 1),
            where="pre",
            color=(BLUE, ORANGE)[place],
        )
    axes.axvline(USEFUL_INCREASE, color=VERMILION, linestyle="--", linewidth=1.3)
    axes.set(title="Layers above a threshold", xlabel="increase of the loss", ylabel="layers", ylim=(0, None))
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _jacobian_depth(scores: Scores) -> Figure | None:
    if scores.jacobian is None:
        return None
    layers = scores.jacobian.layers
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    deviation, diagonal = figure.subplots(1, 2)
    every = mark_every(scores.layers)
    deviation.plot([layer.deviation for layer in layers], color=BLUE, marker="o", markevery=every)
    deviation.set(title="Distance from the identity", ylabel=DEVIATION, ylim=(0, None))
    mean_L = np.array([layer.diagonal_mean for layer in layers])
    std_L = np.array([np.nan if layer.diagonal_std is None else layer.diagonal_std for layer in layers])
    diagonal.fill_between(
        range(scores.layers), mean_L - std_L, mean_L + std_L, color=BLUE, alpha=0.18, linewidth=0, label="± 1 std"
    )
    diagonal.plot(mean_L, color=BLUE, marker="o", markevery=every, label="mean")
    diagonal.axhline(1, color=GREY, linestyle="--", linewidth=1.2, label="identity")
    diagonal.set(title=r"Diagonal of $\bar{J}$", ylabel="entry")
    diagonal.legend(loc="best")
    for axes in (deviation, diagonal):
        _count_layers(axes, scores.layers)
    return figure


def _jacobian_matrices(scores: Scores) -> Figure | None:
    if scores.jacobian is None or scores.jacobian.layers[0].matrix is None:
        return None
    shown = layers_shown(scores.layers)
    rows = 1 if len(shown) <= 4 else 2
    columns = -(-len(shown) // rows)
    pooled, pool = _pooled(scores.jacobian, shown)
    figure = Figure(figsize=(2.5 * columns + 1, 2.6 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, layer, matrix_DD in zip(grid, shown, pooled, strict=False):
        image = axes.imshow(matrix_DD, cmap="RdBu_r", norm=_OF_ENTRIES, interpolation="nearest")
        deviation = scores.jacobian.layers[layer].deviation
        axes.set_title(f"layer {layer}:  {DEVIATION} = {deviation:.3f}", size=8.5, pad=5)
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=GREY)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    label = r"entry of $\bar{J}$" + ("" if pool == 1 else f", the largest in {pool} × {pool}")
    bar = figure.colorbar(image, ax=grid.tolist(), label=label, shrink=0.8, extend="both", pad=0.02)
    bar.set_ticks([-1, -0.5, -0.1, 0, 0.1, 0.5, 1])
    bar.outline.set_visible(False)
    return figure


def _signed_root(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.sign(x) * x**2


# The same for every model, so that what is close to the identity looks so, and yet shows entries of 0.01.
_OF_ENTRIES = FuncNorm((_signed_root, _signed_square), -1, 1)


def _pooled(jacobian: Jacobian, layers: Sequence[int]) -> tuple[list[npt.NDArray[np.float64]], int]:
    """Matrices small enough to be seen, and how many rows and columns a cell stands for.

    A cell is the entry of the largest magnitude: a mean would make the diagonal vanish.
    """
    matrices = [np.array(jacobian.layers[layer].matrix) for layer in layers]
    width = len(matrices[0])
    pool = -(-width // MAX_JACOBIAN_CELLS)
    cells = -(-width // pool)
    pooled = []
    for matrix_DD in matrices:
        blocks = np.zeros((cells * pool, cells * pool))
        blocks[:width, :width] = matrix_DD
        entries_CCE = blocks.reshape(cells, pool, cells, pool).swapaxes(1, 2).reshape(cells, cells, -1)
        largest_CC1 = np.abs(entries_CCE).argmax(-1, keepdims=True)
        pooled.append(np.take_along_axis(entries_CCE, largest_CC1, -1)[..., 0])
    return pooled, pool


def _attention(scores: Scores) -> Figure | None:
    if scores.attention is None:
        return None
    lengths = sorted(scores.attention.lengths.items(), key=lambda item: int(item[0]))
    figure = Figure(figsize=(10, 4), layout="constrained")
    entropy, sparsity = figure.subplots(1, 2)
    length, longest = lengths[-1]
    heads_LH = np.array(longest.entropy_heads)
    shade = {"color": EVEN_COLOURS(1.0), "alpha": 0.12, "linewidth": 0}
    entropy.fill_between(range(scores.layers), heads_LH.min(1), heads_LH.max(1), **shade)
    for place, ((tokens, attention), colour) in enumerate(zip(lengths, _colours(len(lengths)), strict=True)):
        marker = MARKERS[place % len(MARKERS)]
        style = {"color": colour, "marker": marker, "markevery": mark_every(scores.layers)}
        entropy.plot(attention.entropy, label=f"{tokens} tokens", **style)
    entropy.set(title=f"Entropy of attention (shaded: heads over {length} tokens)", ylabel="nats", ylim=(0, None))
    _draw_sparsity(sparsity, longest.sparsity_causal, "A")
    sparsity.set(title=f"Sparsity of attention over {length} tokens", ylabel="share of visible entries", ylim=(0, 1))
    for axes in (entropy, sparsity):
        _count_layers(axes, scores.layers)
        _legend_below(axes)
    return figure


def _weights(scores: Scores) -> Figure | None:
    if scores.weight_sparsity is None:
        return None
    figure = Figure(figsize=(6.2, 4), layout="constrained")
    axes = figure.subplots()
    _draw_sparsity(axes, scores.weight_sparsity.layers, "|θ|")
    axes.set(title="Sparsity of weights", ylabel="share of parameters", yscale="log")
    _count_layers(axes, scores.layers)
    _legend_below(axes)
    return figure


def _draw_sparsity(axes: Axes, sparsity: dict[str, list[float]], what: str) -> None:
    """A line per threshold."""
    thresholds = sorted(sparsity, key=float)
    for place, (threshold, colour) in enumerate(zip(thresholds, _colours(len(thresholds)), strict=True)):
        values_L = np.array(sparsity[threshold])
        values_L[values_L <= 0] = np.nan  # which a logarithmic axis has no place for
        exponent = round(np.log10(float(threshold)))
        label = f"{what} < $10^{{{exponent}}}$"
        axes.plot(values_L, label=label, color=colour, marker=MARKERS[place], markevery=mark_every(len(values_L)))


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    return [EVEN_COLOURS(place) for place in (np.linspace(0.15, 1, count) if count > 1 else [1.0])]


def _count_layers(axes: Axes, num_layers: int) -> None:
    axes.set(xlabel="layer", xlim=(-0.5, num_layers - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _legend_below(axes: Axes) -> None:
    """Where no line can pass through it."""
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0, ncols=4, columnspacing=1.2, handlelength=1.6
    )


FIGURES: dict[str, Callable[[Scores], Figure | None]] = {
    "causal": _causal,
    "permutation": _permutation,
    "usefulness": _usefulness,
    "jacobian_depth": _jacobian_depth,
    "jacobian_matrices": _jacobian_matrices,
    "attention": _attention,
    "weights": _weights,
}
