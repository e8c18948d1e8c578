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
        parts = (x_SBD.split(list(chunk.folds), dim=1) for x_SBD in (before_SBD, after_SBD))
        for fit, before, after in zip(self.fits[layer], *parts, strict=True):
            if before.numel():
                fit.add(before.flatten(0, 1), after.flatten(0, 1))

    def held_bytes(self) -> int:
        return FOLDS * self.num_layers * LeastSquares.held_bytes(self.stack.hidden_size)

    def gather(self) -> None:
        """Layers are dealt out: one worker puts together what all have seen of a layer, and solves for its maps."""
        seen: dict[int, list[list[LeastSquares]]] = {}
        for layer, seen_here in enumerate(self.fits):
            everyone = parallel.gather_at(self._solver(layer), [fold.to("cpu") for fold in seen_here])
            seen_here.clear()
            if everyone is not None:
                seen[layer] = everyone
        solved = {layer: self._solve(everyone) for layer, everyone in seen.items()}
        for layer in range(self.num_layers):
            maps = parallel.from_worker(self._solver(layer), solved.pop(layer, None))
            whole, *of_folds = (found.to(self.stack.device) for found in maps)
            self.scored.append(Substitute(layer, "substitute", (whole,) * FOLDS))
            if of_folds:
                self.held_out.append(Substitute(layer, "held-out substitute", tuple(reversed(of_folds))))

    def _solver(self, layer: int) -> int:
        """The worker that solves for a layer's maps."""
        return layer % parallel.workers()

    def _solve(self, everyone: list[list[LeastSquares]]) -> list[LinearMap]:
        """The map of all sequences, then those of each fold if there is more than one; on the host, to be sent."""
        folds = [merged([fit.to(self.stack.device) for fit in fold]) for fold in zip(*everyone, strict=True)]
        reference = self.options.compat == "reference"
        maps = [LinearMap.fitted(fold, reference=reference) for fold in folds if fold.tokens]
        if len(maps) < FOLDS:
            return [found.to("cpu") for found in maps]
        folds[0].merge(folds[1])
        return [found.to("cpu") for found in (LinearMap.fitted(folds[0], reference=reference), *maps)]

    def interventions(self) -> Iterable[Intervention]:
        return [*self.scored, *self.held_out]

    def result(self, measured: Measured) -> Usefulness:
        return Usefulness(
            scored=Fit.of([measured.increase(substitute) for substitute in self.scored]),
            held_out=Fit.of([measured.increase(substitute) for substitute in self.held_out]) if self.held_out else None,
        )
