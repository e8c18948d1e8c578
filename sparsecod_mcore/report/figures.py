"""Figures of a run."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsecod_mcore.monitor.parquet import Series, read_statistics
from sparsecod_mcore.report.style import EVEN_COLOURS, STYLE, layers_shown, mark_every, save

# Colours of Okabe and Ito, which remain distinct to colour-blind readers; markers tell streams apart in grey.
STREAM_STYLES: dict[str, dict[str, Any]] = {
    "attention": {"label": "attention branch", "color": "#0072B2", "marker": "o", "linestyle": "--"},
    "mlp": {"label": "MLP branch", "color": "#E69F00", "marker": "s", "linestyle": "--"},
    "after_attention": {"label": "after attention", "color": "#56B4E9", "marker": "^"},
    "layer_output": {"label": "layer output", "color": "#222222", "marker": "D"},
}


def save_variance_figure(run_directory: Path, output_stem: Path) -> list[Path]:
    """Draw variance (Eq. 4) against depth at the last iteration, and over training.

    Returns the files written: `output_stem` with the suffixes png and svg.
    Raises UserError where the run directory holds no statistics.
    """
    statistics = read_statistics(run_directory / "stats", statistic="variance")
    series = {stream: statistics.series(stream, "variance") for stream in STREAM_STYLES}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        against_depth, over_training = figure.subplots(1, 2, width_ratios=[1, 1.12])
        _draw_against_depth(against_depth, series)
        _draw_over_training(over_training, series["layer_output"])
        return save(figure, output_stem)


def _draw_against_depth(axes: Axes, series: dict[str, Series]) -> None:
    for stream, style in STREAM_STYLES.items():
        values_L = _positive(series[stream].values_IL[-1])
        axes.plot(values_L, markevery=mark_every(len(values_L)), **style)
    axes.set(
        title=f"Against depth, after {_tokens(series['layer_output'].tokens_I[-1])} tokens",
        xlabel="layer",
        ylabel="variance",
        yscale="log",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Below the axes, where no line can pass through it.
    axes.figure.legend(loc="outside lower left", ncols=len(STREAM_STYLES), columnspacing=1.4)


def _draw_over_training(axes: Axes, layer_output: Series) -> None:
    last_layer = layer_output.values_IL.shape[1] - 1
    depth = Normalize(0, max(last_layer, 1))
    shown = layers_shown(last_layer + 1)
    marker = "o" if len(layer_output.tokens_I) == 1 else None
    for layer in shown:
        is_last = layer == last_layer
        axes.plot(
            layer_output.tokens_I,
            _positive(layer_output.values_IL[:, layer]),
            color=EVEN_COLOURS(depth(layer)),
            linewidth=2.4 if is_last else 1.2,
            marker=marker,
            label=f"last layer ({layer})" if is_last else None,
        )
    axes.set(title="Layer output over training", xlabel="training tokens", ylabel="variance", yscale="log")
    axes.xaxis.set_major_formatter(lambda tokens, _: _tokens(tokens))
    axes.legend(loc="best")
    bar = axes.figure.colorbar(ScalarMappable(depth, EVEN_COLOURS), ax=axes, label="layer", pad=0.02)
    bar.set_ticks(shown)
    bar.outline.set_visible(False)


def _positive(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The values with gaps where a logarithmic axis has no place for them."""
    return np.where(values > 0, values, np.nan)


def _tokens(count: float) -> str:
    """A count of tokens as one says it: 500, 40k, 1.2M, 100B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"
