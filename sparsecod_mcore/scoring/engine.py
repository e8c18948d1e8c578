"""Runs a model as it is and under interventions, without running twice what does not change.

An intervention at position p leaves h_0 to h_p as they are, so only the layers above run; those of all interventions
that start at p run side by side, in batches where they need the same layer.

Axes: S positions, B sequences of a chunk, D hidden width, L layers, N sequences, T + 1 tokens of each.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import batched

import torch

from sparsecod_mcore.progress import ProgressLine
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.interventions import Intervention
from sparsecod_mcore.scoring.plan import Plan, Unit, cost, evenly, share_of
from sparsecod_mcore.scoring.score import Chunk, Score
from sparsecod_mcore.scoring.stack import Stack
from sparsecod_mcore.scoring.work_file import UnitSums, WorkFiles


@dataclass(frozen=True)
class Unchanged:
    """Sums over all tokens of the model as it is."""

    loss: float
    contributions_L: list[float]


class UnitProgress(ProgressLine):
    """Tells how many of this worker's units are done."""

    def __init__(self, what: str, todo: Sequence[Unit], num_layers: int) -> None:
        super().__init__(what)
        self._num_layers, self._total_units = num_layers, len(todo)
        self._total = sum(cost(unit, num_layers) for unit in todo)
        self._done, self._done_units = 0, 0

    def advance(self, unit: Unit) -> None:
        self._done += cost(unit, self._num_layers)
        self._done_units += 1
        self.show(self._done / self._total)

    def amounts(self, seconds: float) -> str:
        return f"{self._done_units} of {self._total_units} units"


class Engine:
    """One model on one set of tokens."""

    def __init__(self, stack: Stack, tokens_NT: torch.Tensor, plan: Plan) -> None:
        self.stack, self.plan = stack, plan
        self._tokens_NT = tokens_NT
        self._kept: tuple[Chunk, list[torch.Tensor]] | None = None

    def run_unchanged(self, scores: Sequence[Score]) -> Unchanged:
        """Run the model as it is once over all chunks, before the eyes of all `scores`. Collective."""
        chunks, worker = self.plan.chunks, parallel.worker()
        mine = [chunk for k, chunk in enumerate(chunks) if k * parallel.workers() // len(chunks) == worker]
        sums: list[Unchanged] = []
        with ExitStack() as watching:
            for score in scores:
                watching.enter_context(score.watching())
            for chunk in mine:
                sums.append(self._run_unchanged(chunk, scores))
        for score in scores:
            score.gather()
        everyone = [item for items in parallel.gather_from_workers(sums) for item in items]
        contributions = zip(*(item.contributions_L for item in everyone), strict=True)
        return Unchanged(math.fsum(item.loss for item in everyone), [math.fsum(layer) for layer in contributions])

    def _run_unchanged(self, chunk: Chunk, scores: Sequence[Score]) -> Unchanged:
        inputs_BS, targets_BS = self._tokens(chunk)
        hidden_SBD = self.stack.embed(inputs_BS)
        contributions_L = []
        for layer in range(self.stack.num_layers):
            after_SBD = self.stack.layer(layer, hidden_SBD)
            contributions_L.append(_sum_of_norms(after_SBD.float() - hidden_SBD.float()))
            for score in scores:
                score.observe(chunk, layer, hidden_SBD, after_SBD)
            hidden_SBD = after_SBD
        return Unchanged(self._loss(hidden_SBD, targets_BS), contributions_L)

    def run_units(self, groups: Mapping[int, Sequence[Intervention]], files: WorkFiles[UnitSums]) -> list[UnitSums]:
        """Run all interventions on all chunks, except what `files` know already. Collective; in the order of units."""
        units = [Unit(chunk, first) for chunk in self.plan.chunks for first in groups]
        known = parallel.from_first(files.read)
        todo = [unit for unit in units if unit.name not in known]
        mine = share_of(todo, self.stack.num_layers, parallel.worker(), parallel.workers())
        measured: dict[str, UnitSums] = {}
        if parallel.is_first() and mine:
            with UnitProgress("scoring", mine, self.stack.num_layers) as progress:
                for unit in mine:
                    measured[unit.name] = self._run_and_record(unit, groups, files)
                    progress.advance(unit)
        else:
            measured = {unit.name: self._run_and_record(unit, groups, files) for unit in mine}
        self._kept = None
        for others in parallel.gather_from_workers(measured):
            known |= others
        return [known[unit.name] for unit in units]

    def _run_and_record(
        self, unit: Unit, groups: Mapping[int, Sequence[Intervention]], files: WorkFiles[UnitSums]
    ) -> UnitSums:
        sums = self.run_unit(unit, groups[unit.first])
        if parallel.is_first_of_worker():
            files.append(parallel.worker(), unit.name, sums)
        return sums

    def run_unit(self, unit: Unit, interventions: Sequence[Intervention]) -> UnitSums:
        """Run `interventions`, which all start at the unit's layer, side by side."""
        stack, chunk = self.stack, unit.chunk
        _, targets_BS = self._tokens(chunk)
        hiddens = self._hiddens(chunk)
        states = {item: item.enter(stack, hiddens[unit.first], chunk.folds) for item in interventions}
        changes: dict[str, list[float]] = {item.name: [] for item in interventions if item.observed}
        B, S = targets_BS.shape
        at_once = max(1, self.plan.tokens_at_once // (B * S))
        for position in range(unit.first + 1, stack.num_layers):
            by_layer: dict[int, list[Intervention]] = {}
            for item in interventions:
                by_layer.setdefault(item.layer_at(position), []).append(item)
            for layer, items in by_layer.items():
                for batch in batched(items, evenly(len(items), at_once)):
                    before = [states[item] for item in batch]
                    joined_SBD = before[0] if len(batch) == 1 else torch.cat(before, dim=1)
                    after = stack.layer(layer, joined_SBD).split(B, dim=1)
                    for item, before_SBD, after_SBD in zip(batch, before, after, strict=True):
                        states[item] = after_SBD
                        if item.observed:
                            usual_SBD = hiddens[position + 1].float() - hiddens[position].float()
                            change_SBD = after_SBD.float() - before_SBD.float() - usual_SBD
                            changes[item.name].append(_sum_of_norms(change_SBD))
        losses = {item.name: self._loss(state_SBD, targets_BS) for item, state_SBD in states.items()}
        return {"losses": losses, "changes": changes}

    def _hiddens(self, chunk: Chunk) -> list[torch.Tensor]:
        """h_0 to h_L of a chunk, kept until another is asked for."""
        if self._kept is None or self._kept[0] != chunk:
            self._kept = None
            hiddens = [self.stack.embed(self._tokens(chunk)[0])]
            for layer in range(self.stack.num_layers):
                hiddens.append(self.stack.layer(layer, hiddens[-1]))
            self._kept = chunk, hiddens
        return self._kept[1]

    def _tokens(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_BT = self._tokens_NT[chunk.begin : chunk.end].to(self.stack.device)
        return tokens_BT[:, :-1], tokens_BT[:, 1:]

    def _loss(self, hidden_SBD: torch.Tensor, targets_BS: torch.Tensor) -> float:
        return self.stack.losses(hidden_SBD, targets_BS).sum(dtype=torch.float64).item()


def _sum_of_norms(x_SBD: torch.Tensor) -> float:
    return torch.linalg.vector_norm(x_SBD, dim=-1).sum(dtype=torch.float64).item()
