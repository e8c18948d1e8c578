"""How much it harms to put the best linear map in a layer's place (Eq. 9, 10)."""

from collections.abc import Iterable

import torch

from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.interventions import Intervention, Substitute
from sparsecod_mcore.scoring.linear import LeastSquares, LinearMap, merged
from sparsecod_mcore.scoring.results import Fit, Usefulness
from sparsecod_mcore.scoring.score import Chunk, Measured, Options, Score
from sparsecod_mcore.scoring.stack import Stack

FOLDS = 2


class UsefulnessScore(Score):
    """Maps fitted on the scored sequences, as the paper does, and for each half of them on the other half."""

    name = "usefulness"

    def __init__(self, stack: Stack, options: Options) -> None:
        super().__init__(stack, options)
        self.fits = [
            [LeastSquares(stack.hidden_size, stack.device) for _ in range(FOLDS)] for _ in range(stack.num_layers)
        ]
        self.scored: list[Substitute] = []
        self.held_out: list[Substitute] = []

    def observe(self, chunk: Chunk, layer: int, before_SBD: torch.Tensor, after_SBD: torch.Tensor) -> None:
        self.fits[layer][chunk.fold].add(before_SBD.flatten(0, 1), after_SBD.flatten(0, 1))

    def held_bytes(self) -> int:
        return FOLDS * self.num_layers * LeastSquares.held_bytes(self.stack.hidden_size)

    def gather(self) -> None:
        reference = self.options.compat == "reference"
        for layer, seen_here in enumerate(self.fits):
            folds = [merged(parallel.gather_from_workers(fold)) for fold in seen_here]
            seen_here.clear()
            maps = [LinearMap.fitted(fold, reference=reference) for fold in folds if fold.tokens]
            if len(maps) == FOLDS:
                self.held_out.append(Substitute(layer, "held-out substitute", tuple(reversed(maps))))
                folds[0].merge(folds[1])
            whole = LinearMap.fitted(folds[0], reference=reference)
            self.scored.append(Substitute(layer, "substitute", (whole,) * FOLDS))

    def interventions(self) -> Iterable[Intervention]:
        return [*self.scored, *self.held_out]

    def result(self, measured: Measured) -> Usefulness:
        return Usefulness(
            scored=Fit.of([measured.increase(substitute) for substitute in self.scored]),
            held_out=Fit.of([measured.increase(substitute) for substitute in self.held_out]) if self.held_out else None,
        )
