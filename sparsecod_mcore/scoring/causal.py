"""How much each layer changes what later layers add (Eq. 5, 6)."""

from collections.abc import Iterable
from statistics import fmean

from sparsecod_mcore.scoring.interventions import Intervention, Skip
from sparsecod_mcore.scoring.pairs import matrix
from sparsecod_mcore.scoring.results import Causal
from sparsecod_mcore.scoring.score import Measured, Score


class CausalScore(Score):
    """One run per layer gives all its pairs, so that there is nothing to sample."""

    name = "causal"

    def interventions(self) -> Iterable[Intervention]:
        return map(Skip, range(self.num_layers))

    def result(self, measured: Measured) -> Causal:
        effects = {
            (skipped, layer): change / measured.contributions_L[layer]
            for skipped in range(self.num_layers)
            for layer, change in enumerate(measured.changes[Skip(skipped).name], start=skipped + 1)
        }
        return Causal(matrix=matrix(self.num_layers, effects), score=fmean(effects.values()))
