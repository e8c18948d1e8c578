"""Through what the variance of the residual stream grows: the covariance split, summed over a model.

Axes: P parts, L layers, I measured steps.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsecod_mcore.report.gather import Run

PARTS = ("attention branch", "MLP branch", "attention with shortcut", "MLP with shortcut")


@dataclass(frozen=True)
class Growth:
    """Var(h_L) − Var(h_0), at the end of training, split as Var(h + f) = Var(h) + Var(f) + 2 Cov(h, f) at every add."""

    first: float  # Var(h_0)
    last: float  # Var(h_L)
    shares_PL: npt.NDArray[np.float64]  # of the growth; all together 1
    scatter_P: npt.NDArray[np.float64]  # standard deviation over the last measured steps of each part's share

    @property
    def shares_P(self) -> npt.NDArray[np.float64]:
        return self.shares_PL.sum(axis=1)


def growth_of(run: Run) -> Growth | None:
    """The growth, averaged over the last tenth of the measured steps; None where not measured, or nothing grew."""
    windows = [
        run.window(stream, statistic)
        for stream, statistic in (
            ("attention", "variance"),
            ("mlp", "variance"),
            ("after_attention", "covariance"),
            ("layer_output", "covariance"),
        )
    ]
    first_IL = run.window("after_attention", "shortcut_variance")
    last_IL = run.window("layer_output", "variance")
    if first_IL is None or last_IL is None or any(window is None for window in windows):
        return None
    parts_PIL = np.array(windows) * np.array([1.0, 1.0, 2.0, 2.0])[:, None, None]
    total_I = parts_PIL.sum(axis=(0, 2))
    if not (np.isfinite(total_I).all() and (total_I > 0).all()):
        return None
    return Growth(
        first=float(first_IL[:, 0].mean()),
        last=float(last_IL[:, -1].mean()),
        shares_PL=parts_PIL.mean(axis=1) / total_I.mean(),
        scatter_P=(parts_PIL.sum(axis=2) / total_I).std(axis=1),
    )
