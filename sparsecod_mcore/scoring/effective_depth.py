"""How many layers do what no linear map does, and how many are wasted."""

from sparsecod_mcore.scoring.results import USEFUL_INCREASE, EffectiveDepth, Fit, Usefulness
from sparsecod_mcore.scoring.score import Measured, Score


class EffectiveDepthScore(Score):
    """E and W, counted from the usefulness of the same run."""

    name = "effective_depth"
    needs = ("usefulness",)

    def result(self, measured: Measured) -> EffectiveDepth:
        usefulness: Usefulness = measured.finished["usefulness"]
        effective = _effective(usefulness.scored)
        held_out = None if usefulness.held_out is None else _effective(usefulness.held_out)
        return EffectiveDepth(
            effective=effective,
            wasted=self.num_layers - effective,
            held_out_effective=held_out,
            held_out_wasted=None if held_out is None else self.num_layers - held_out,
        )


def _effective(fit: Fit) -> int:
    return sum(increase > USEFUL_INCREASE for increase in fit.relative_loss_increase)
