"""Weights put into a model of Megatron's, whatever its parallel layout and its layer spec."""

import re
from collections import defaultdict
from itertools import islice
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel

from sparsecod_mcore.exchange.hugging_face import HuggingFaceModel

_STACKED = re.compile(r"^decoder\.layers\.(?!\d)")


class _Piece(NamedTuple):
    """A part of a whole tensor, and the memory of the model that it belongs in."""

    memory: torch.Tensor
    offset: tuple[int, ...]

    def fill(self, whole: torch.Tensor) -> None:
        for dim, start in enumerate(self.offset):
            whole = whole.narrow(dim, start, self.memory.shape[dim])
        self.memory.copy_(whole)


@torch.no_grad()
def load_parameters(model: GPTModel, source: HuggingFaceModel) -> None:
    """Copy `source` into `model`, this rank's part of it; what other ranks hold is not read.

    The model says itself, as for a checkpoint, which part of which whole tensor each of its parameters is.
    """
    pieces = _pieces(model)
    for weight in source.weights:
        expert = None if weight.expert is None else weight.expert[0]
        wanted = [piece for name in weight.names for piece in pieces.pop((name, expert), ())]
        if wanted:
            whole = source.read(weight)
            for piece in wanted:
                piece.fill(whole)
    assert not pieces, sorted(pieces)


def _pieces(model: GPTModel) -> dict[tuple[str, int | None], list[_Piece]]:
    """By name, and number of the expert."""
    state = model.sharded_state_dict()
    apply_factories(state)
    found: dict[tuple[str, int | None], list[_Piece]] = defaultdict(list)
    for part in nested_values(state):
        if isinstance(part, ShardedTensor) and part.data is not None:
            place = iter(part.global_offset)
            name = part.key
            if _STACKED.match(name):  # all layers as one tensor [layer, ...]
                name = _STACKED.sub(f"decoder.layers.{next(place)}.", name)
            experts = part.prepend_axis_num - (name != part.key)
            [expert] = [*islice(place, experts)] or [None]
            found[name, expert].append(_Piece(part.data, tuple(place)))
    return found
