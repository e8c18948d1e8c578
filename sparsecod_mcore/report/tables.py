"""Plain-text tables of a run, and of what was measured of a model."""

from pathlib import Path

import numpy as np

from sparsecod_mcore.monitor.parquet import read_statistics
from sparsecod_mcore.scoring.results import SPARSITY_THRESHOLDS, Scores

_HEADINGS = (
    "layer", "attention", "after attention", "mlp", "layer output", "growth", "covariance share",
)  # fmt: skip
_LEGEND = """\
growth: variance of the layer's output over that of its input
covariance share: part of the output's variance that the layer gained from 2 Cov(branch, residual)"""


def variance_table(run_directory: Path) -> str:
    """Variance (Eq. 4) of each stream by layer, at the last recorded iteration.

    Beside it what each layer makes of its input: its growth Var(h_{l+1}) / Var(h_l), and the share of
    Var(h_{l+1}) that is 2 Cov(h, f), summed over its two adds, of Var(h + f) = Var(h) + Var(f) + 2 Cov(h, f).
    Raises UserError where the run directory holds no statistics.
    """
    statistics = read_statistics(run_directory / "stats")

    def last(stream: str, statistic: str) -> np.ndarray:
        return statistics.series(stream, statistic).values_IL[-1]

    input_L = last("after_attention", "shortcut_variance")
    output_L = last("layer_output", "variance")
    covariance_L = last("after_attention", "covariance") + last("layer_output", "covariance")
    with np.errstate(divide="ignore", invalid="ignore"):  # a stream of zeros has neither growth nor share
        growth_L = output_L / input_L
        share_L = 2 * covariance_L / output_L
    streams = [last(stream, "variance") for stream in ("attention", "after_attention", "mlp")]
    rows = [
        [str(layer), *(_number(value) for value in values), f"{growth:.3f}x", f"{share:.1%}"]
        for layer, (*values, growth, share) in enumerate(zip(*streams, output_L, growth_L, share_L, strict=True))
    ]
    iterations_I, tokens_I, _ = statistics.series("layer_output", "variance")
    title = f"Variance by layer after iteration {iterations_I[-1]:,} ({tokens_I[-1]:,} training tokens)"
    return f"{title}\n\n{aligned([list(_HEADINGS), *rows])}\n\n{_LEGEND}"


def sparsity_table(scores: Scores) -> str:
    """Sparsity of weights and attention, entropy, variance and kurtosis by layer, as far as they were measured."""
    threshold = str(max(SPARSITY_THRESHOLDS))
    columns = {}
    if scores.weight_sparsity is not None:
        columns[f"weights < {threshold}"] = [f"{share:.3%}" for share in scores.weight_sparsity.layers[threshold]]
    for length, attention in scores.attention.lengths.items() if scores.attention is not None else ():
        columns[f"attention < {threshold}, T = {length}"] = [
            f"{share:.2%}" for share in attention.sparsity_causal[threshold]
        ]
        columns[f"entropy (nats), T = {length}"] = [f"{nats:.3f}" for nats in attention.entropy]
    if scores.moments is not None:
        stream = scores.moments.streams["layer_output"]
        for heading, statistic in (("output variance", "variance"), ("output kurtosis", "dimension_kurtosis")):
            columns[heading] = [_number(value) for value in stream[statistic]]
    layers = [str(layer) for layer in range(scores.layers)]
    return aligned([["layer", *columns], *map(list, zip(layers, *columns.values(), strict=True))])


def jacobian_table(run_directory: Path) -> str:
    """How far each layer's Jacobian was from the identity when it was last probed, with standard errors.

    Raises UserError where the run directory holds no such statistics.
    """
    statistics = read_statistics(run_directory / "stats")
    iterations_I, _, _ = statistics.series("jacobian", "deviation")
    columns: dict[str, np.ndarray] = {
        heading: statistics.series(stream, statistic).values_IL[-1]
        for heading, stream, statistic in (
            ("|J - I| / D", "jacobian", "deviation"),
            ("+-", "jacobian", "deviation_error"),
            ("attention", "jacobian_attention", "deviation"),
            ("mlp", "jacobian_mlp", "deviation"),
            ("tr J / D", "jacobian", "diagonal"),
        )
    }
    rows = [[str(layer), *map(_number, values)] for layer, values in enumerate(zip(*columns.values(), strict=True))]
    title = f"Distance from the identity by layer, probed at iteration {iterations_I[-1]:,} (docs/jacobian.md)"
    return f"{title}\n\n{aligned([['layer', *columns], *rows])}"


def _number(value: float) -> str:
    """Four significant digits, trailing zeros included."""
    return f"{value:#.4g}".rstrip(".")


def aligned(rows: list[list[str]], *, left: bool = False) -> str:
    """Columns aligned right, as numbers are, or `left`; the first row underlined."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    justify = str.ljust if left else str.rjust
    lines = ["  ".join(map(justify, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
