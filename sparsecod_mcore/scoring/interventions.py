"""What is done to a model: at one position of the stack something else happens, and the layers above it run on.

Position p is where layer p runs in the model as it is. `first` is the first position at which an intervention changes
anything, so that it starts from the unchanged h_first.

Axes: S positions of a sequence, B sequences, D hidden width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsecod_mcore.scoring.linear import LinearMap
from sparsecod_mcore.scoring.stack import Stack


@dataclass(frozen=True)
class Intervention:
    """The model as it is but for position `first`."""

    first: int

    observed: ClassVar[bool] = False  # whether the change of what later layers add is wanted, beside the loss

    @property
    def name(self) -> str:
        """Names the intervention in a work file, and in it only once."""
        raise NotImplementedError

    def enter(self, stack: Stack, hidden_SBD: torch.Tensor, folds: Sequence[int]) -> torch.Tensor:
        """What leaves position `first` for the unchanged `hidden_SBD` that enters it, `folds` sequences of each."""
        raise NotImplementedError

    def layer_at(self, position: int) -> int:
        """The layer that runs at a later position."""
        return position


@dataclass(frozen=True)
class Skip(Intervention):
    """h_{l+1} := h_l."""

    observed = True

    @property
    def name(self) -> str:
        return f"skip {self.first}"

    def enter(self, stack: Stack, hidden_SBD: torch.Tensor, folds: Sequence[int]) -> torch.Tensor:
        return hidden_SBD


@dataclass(frozen=True)
class Swap(Intervention):
    """Layers `first` and `second`, which is above it, change places."""

    second: int

    @property
    def name(self) -> str:
        return f"swap {self.first} {self.second}"

    def enter(self, stack: Stack, hidden_SBD: torch.Tensor, folds: Sequence[int]) -> torch.Tensor:
        return stack.layer(self.second, hidden_SBD)

    def layer_at(self, position: int) -> int:
        return self.first if position == self.second else position


@dataclass(frozen=True)
class Substitute(Intervention):
    """A linear map in the layer's place; `maps` holds one for each fold of sequences."""

    kind: str
    maps: tuple[LinearMap, ...]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.first}"

    def enter(self, stack: Stack, hidden_SBD: torch.Tensor, folds: Sequence[int]) -> torch.Tensor:
        parts = zip(self.maps, hidden_SBD.split(list(folds), dim=1), strict=True)
        return torch.cat([linear_map(part_SBD) for linear_map, part_SBD in parts], dim=1)


@dataclass(frozen=True)
class ZeroExperts(Intervention):
    """The layer's routed experts give zero; attention, shared experts and the shortcut stay."""

    @property
    def name(self) -> str:
        return f"zero experts {self.first}"

    def enter(self, stack: Stack, hidden_SBD: torch.Tensor, folds: Sequence[int]) -> torch.Tensor:
        def zero(module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, None]) -> object:
            return torch.zeros_like(output[0]), None

        handle = stack.layers[self.first].mlp.experts.register_forward_hook(zero)
        try:
            return stack.layer(self.first, hidden_SBD)
        finally:
            handle.remove()


def by_first(interventions: Iterable[Intervention]) -> dict[int, list[Intervention]]:
    """Interventions by where they start, each once though several scores ask for it."""
    groups: dict[int, list[Intervention]] = {}
    for intervention in dict.fromkeys(interventions):
        groups.setdefault(intervention.first, []).append(intervention)
    return dict(sorted(groups.items()))
