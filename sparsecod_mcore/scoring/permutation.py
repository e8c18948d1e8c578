"""How much it harms to let two layers change places (Eq. 7, 8)."""

from collections.abc import Iterable
from statistics import fmean

from sparsecod_mcore.scoring.interventions import Intervention, Swap
from sparsecod_mcore.scoring.pairs import choose_pairs, interval, matrix
from sparsecod_mcore.scoring.results import Permutation
from sparsecod_mcore.scoring.score import Measured, Options, Score
from sparsecod_mcore.scoring.stack import Stack


class PermutationScore(Score):
    """All pairs of layers, or a sample of them."""

    name = "permutation"

    def __init__(self, stack: Stack, options: Options) -> None:
        super().__init__(stack, options)
        self.pairs = choose_pairs(self.num_layers, options.sampled_pairs, options.seed)

    def interventions(self) -> Iterable[Intervention]:
        return (Swap(first, second) for first, second in self.pairs)

    def result(self, measured: Measured) -> Permutation:
        harm = {pair: abs(measured.increase(Swap(*pair))) for pair in self.pairs}
        return Permutation(
            matrix=matrix(self.num_layers, harm),
            score=fmean(harm.values()),
            interval=interval(self.num_layers, harm),
        )
