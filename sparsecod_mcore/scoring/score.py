"""What a score is made of: interventions to run, things to watch while the model runs as it is, and their upshot.

Axes: S positions, B sequences, D hidden width, L layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparsecod_mcore.scoring.interventions import Intervention
from sparsecod_mcore.scoring.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices that change figures."""

    compat: Literal["paper", "reference"] = "paper"
    sampled_pairs: int | None = None  # of layers, for scores over pairs; None for all
    jacobian_sequences: int = 8  # of which Jacobians are taken
    jacobian_probes: int | None = None  # random directions; None for all of the matrix
    seed: int = 1234


@dataclass(frozen=True)
class Chunk:
    """Sequences `begin` to `end`, which are run together; `folds` says how many are of each half of the data."""

    begin: int
    end: int
    folds: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """What the model did over all sequences, as it is and under each intervention. The same on every rank."""

    stack: Stack
    tokens_NT: torch.Tensor  # [N, T + 1]
    loss: float
    contributions_L: Sequence[float]  # mean_t ‖h_{l+1} − h_l‖
    losses: Mapping[str, float]  # by name of intervention
    changes: Mapping[str, Sequence[float]]  # mean_t ‖change of h_{l+1} − h_l‖, per layer above the intervention's
    finished: dict[str, Any]  # results of the scores before this one, by name

    def increase(self, intervention: Intervention) -> float:
        """Relative increase of the loss."""
        return (self.losses[intervention.name] - self.loss) / self.loss


class Score:
    """One figure, or several, of a model. One object serves one run.

    In order: `watching` is entered, `observe` called for every layer of every chunk while the model runs as it is,
    `gather` adds up what workers saw, `interventions` says what is to be run, and `result` gives the entry that
    `Scores` has under `name`. A score that needs neither may compute all in `result`.
    """

    name: str
    needs: tuple[str, ...] = ()  # names of scores that `result` reads

    def __init__(self, stack: Stack, options: Options) -> None:
        self.stack, self.options = stack, options
        self.num_layers = stack.num_layers

    def watching(self) -> AbstractContextManager[Any]:
        """Around the run of the model as it is."""
        return nullcontext()

    def observe(self, chunk: Chunk, layer: int, before_SBD: torch.Tensor, after_SBD: torch.Tensor) -> None:
        """h_l and h_{l+1} of one chunk."""

    def held_bytes(self) -> int:
        """What the score keeps in memory of what it observes, if that is much."""
        return 0

    def gather(self) -> None:
        """Collective over all ranks."""

    def interventions(self) -> Iterable[Intervention]:
        return ()

    def result(self, measured: Measured) -> Any:
        raise NotImplementedError
