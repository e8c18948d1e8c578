"""The loss with each layer removed."""

from collections.abc import Iterable

from sparsecod_mcore.scoring import interventions, results
from sparsecod_mcore.scoring.score import Measured, Score


class SkipScore(Score):
    """Shares its runs with the causal score."""

    name = "skip"

    def interventions(self) -> Iterable[interventions.Intervention]:
        return map(interventions.Skip, range(self.num_layers))

    def result(self, measured: Measured) -> results.Skip:
        skips = list(map(interventions.Skip, range(self.num_layers)))
        return results.Skip(
            loss=[measured.losses[skip.name] for skip in skips],
            relative_loss_increase=[measured.increase(skip) for skip in skips],
        )
