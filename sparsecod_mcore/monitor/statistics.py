"""From reduced moments to named statistics. Sums until here; the only division is by the number of tokens.

Axes: L layers, A residual adds, M moments. Names and formulas: "What is measured" in docs/statistics.md.
"""

import torch

from sparsecod_mcore.model.residual import ATTENTION_ADD, MLP_ADD
from sparsecod_mcore.ops import Moment

# A residual add measures its branch f, the shortcut h it is added to, and the sum y.
BRANCH_STREAM = {ATTENTION_ADD: "attention", MLP_ADD: "mlp"}
SUM_STREAM = {ATTENTION_ADD: "after_attention", MLP_ADD: "layer_output"}
# The order in which values flow through a layer.
STREAMS = ("attention", "after_attention", "mlp", "layer_output")

type LayerStatistics = dict[tuple[str, str], torch.Tensor]  # (stream, statistic) -> [L]


def layer_statistics(moments_LAM: torch.Tensor) -> LayerStatistics:
    """Name what one iteration's moments [L, A, M], summed over all ranks, say of each layer and stream.

    Per stream: token variance (Eq. 4), mean square of the token means, mean kurtosis and fourth central moment of a
    token over the width, largest magnitude, counts of non-finite values and of tokens. For a sum y = h + f also Var(h)
    and Cov(h, f): Var(y) = Var(h) + Var(f) + 2 Cov(h, f).
    """
    statistics: LayerStatistics = {}
    for add in (ATTENTION_ADD, MLP_ADD):
        moments_ML = moments_LAM[:, add].T
        tokens_L = moments_ML[Moment.TOKENS]

        def mean(moment: Moment, moments_ML: torch.Tensor = moments_ML) -> torch.Tensor:
            return moments_ML[moment] / moments_ML[Moment.TOKENS]

        for stream, operand in ((BRANCH_STREAM[add], "BRANCH"), (SUM_STREAM[add], "OUTPUT")):
            statistics[stream, "variance"] = mean(Moment[f"{operand}_VARIANCE"])
            statistics[stream, "squared_mean"] = mean(Moment[f"{operand}_SQUARED_MEAN"])
            statistics[stream, "fourth_moment"] = mean(Moment[f"{operand}_FOURTH_MOMENT"])
            statistics[stream, "kurtosis"] = mean(Moment[f"{operand}_KURTOSIS"])
            statistics[stream, "max"] = moments_ML[Moment[f"{operand}_MAX"]]
            statistics[stream, "tokens"] = tokens_L
            statistics[stream, "non_finite"] = moments_ML[Moment[f"{operand}_NONFINITE"]]
        statistics[SUM_STREAM[add], "shortcut_variance"] = mean(Moment.RESIDUAL_VARIANCE)
        statistics[SUM_STREAM[add], "covariance"] = mean(Moment.COVARIANCE)
    return statistics


def first_non_finite(statistics: LayerStatistics) -> tuple[int, str, int] | None:
    """The first (layer, stream, count) in the order of the forward pass that holds non-finite values, if any."""
    num_layers = len(statistics[STREAMS[0], "non_finite"])
    for layer in range(num_layers):
        for stream in STREAMS:
            count = int(statistics[stream, "non_finite"][layer])
            if count:
                return layer, stream, count
    return None
