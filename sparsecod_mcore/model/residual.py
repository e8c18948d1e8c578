"""The residual adds of a transformer layer, which measure what they add.

Megatron asks its layer spec for a factory of the add at two places, after attention and after the MLP. A module class
there gives one instance per layer, which learns its place once the model is built (`bind_residual_adds`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from sparsecod_mcore.ops import residual_add_moments

ATTENTION_ADD, MLP_ADD = 0, 1  # index of a layer's two residual adds, in the order they run
ADDS_PER_LAYER = 2

type Add = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]
type BranchObserver = Callable[[int, int, torch.Tensor], None]  # of a layer's add, what it adds


class SumsSource(Protocol):
    """Where a residual add finds the sums it adds to; None when the running step does not measure them."""

    def moments(self, layer: int, add: int) -> torch.Tensor | None: ...

    def columns(self, layer: int, add: int, mean: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """`mean` gives the mean [D] over tokens of what is about to be added."""


@dataclass(frozen=True)
class Sums:
    """What one add of a measured step adds to: its moments, and its column sums about a mean [D], where wanted.

    `observe`, if there is one, is shown the branch.
    """

    moments: torch.Tensor
    columns: Callable[[Callable[[], torch.Tensor]], torch.Tensor | None]
    observe: Callable[[torch.Tensor], None] | None


class MeasuredResidualAdd(torch.nn.Module):
    """y = dropout(branch + bias) + residual; on measured steps its moments are accumulated in the same pass.

    Counted: training forwards that will have a backward, each microbatch once. Under full recomputation the first,
    gradient-free forward is passed over and the recomputed one counts. An add bound to no layer never measures; one
    that is bound in evaluation measures every forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self._source: SumsSource | None = None
        self._layer = -1
        self._add = -1
        self._in_evaluation = False
        self._observe: BranchObserver | None = None

    def bind(
        self,
        source: SumsSource | None,
        layer: int,
        add: int,
        *,
        in_evaluation: bool = False,
        observe: BranchObserver | None = None,
    ) -> None:
        """Measure into `source` as residual add `add` of layer `layer`, counted from 0 over the whole model.

        `observe` is shown every branch that is measured.
        """
        self._source, self._layer, self._add = source, layer, add
        self._in_evaluation, self._observe = in_evaluation, observe

    def forward(self, training: bool, fused: bool) -> Add:
        """Megatron's protocol: return the function that adds. `fused` is moot, the add is one kernel anyway."""
        source = self._source if training or self._in_evaluation else None
        moments = None if source is None else source.moments(self._layer, self._add)

        def add(
            branch_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            branch, bias = branch_with_bias
            if branch.dtype != residual.dtype:  # --fp32-residual-connection keeps the stream in float32
                branch = branch.to(residual.dtype)
                bias = None if bias is None else bias.to(residual.dtype)
            if bias is not None:  # rounded before it is added, measured or not: measuring must not change training
                branch = branch + bias
            if training and dropout > 0.0:
                branch = torch.nn.functional.dropout(branch, p=dropout)
            # Under full recomputation Megatron enables gradients around the add in both forwards; what the branch
            # carries tells them apart.
            counts = self._in_evaluation or (branch.requires_grad and torch.is_grad_enabled())
            if source is None or moments is None or not counts:
                return self.join(branch, residual, None)
            place = self._layer, self._add
            observe = None if self._observe is None else partial(self._observe, *place)
            return self.join(branch, residual, Sums(moments, partial(source.columns, *place), observe))

        return add

    def join(self, branch: torch.Tensor, residual: torch.Tensor, sums: Sums | None) -> torch.Tensor:
        """The stream behind the add; what was added to it, and what to, is measured into `sums` if they are given."""
        if sums is None:
            return residual + branch
        if sums.observe is not None:
            sums.observe(branch)
        columns = sums.columns(lambda: _token_mean(branch) + _token_mean(residual))
        return residual_add_moments(branch, residual, sums.moments, columns=columns)


def _token_mean(x: torch.Tensor) -> torch.Tensor:
    return x.detach().flatten(0, -2).mean(0, dtype=torch.float32)


def bind_residual_adds(
    model_chunks: Sequence[MegatronModule],
    source: SumsSource | None,
    *,
    in_evaluation: bool = False,
    observe: BranchObserver | None = None,
) -> None:
    """Bind the residual adds of all decoder layers in `model_chunks` to `source`, or to none."""
    for chunk in model_chunks:
        for layer in chunk.decoder.layers:
            assert isinstance(layer, TransformerLayer), type(layer)
            for add, module in ((ATTENTION_ADD, layer.self_attn_bda), (MLP_ADD, layer.mlp_bda)):
                module.bind(source, layer.layer_number - 1, add, in_evaluation=in_evaluation, observe=observe)
