"""How routers use their experts, and what is lost without them."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.interventions import Intervention, ZeroExperts
from sparsecod_mcore.scoring.results import Experts, LayerExperts
from sparsecod_mcore.scoring.score import Measured, Options, Score
from sparsecod_mcore.scoring.stack import Stack


class MoEScore(Score):
    """Of every layer that has experts: how often each is selected, how evenly, and the loss when they give zero."""

    name = "moe"

    def __init__(self, stack: Stack, options: Options) -> None:
        super().__init__(stack, options)
        layers = [index for index, layer in enumerate(stack.layers) if isinstance(layer.mlp, MoELayer)]
        if not layers:
            raise UserError("the score 'moe' is of layers with experts, and this model has none")
        experts = stack.model.config.num_moe_experts
        self.choices_E = {layer: torch.zeros(experts, dtype=torch.float64, device=stack.device) for layer in layers}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for layer, choices_E in self.choices_E.items():
                hooks.callback(self._count(self.stack.layers[layer].mlp.router, choices_E).remove)
            yield

    @staticmethod
    def _count(router: torch.nn.Module, choices_E: torch.Tensor) -> Any:
        def add(module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            _, routing_map_TE = output
            choices_E.add_(routing_map_TE.sum(0))

        return router.register_forward_hook(add)

    def gather(self) -> None:
        for choices_E in self.choices_E.values():
            parallel.sum_over_workers(choices_E)

    def interventions(self) -> Iterable[Intervention]:
        return map(ZeroExperts, self.choices_E)

    def result(self, measured: Measured) -> Experts:
        return Experts(layers={str(layer): self._of_layer(layer, measured) for layer in self.choices_E})

    def _of_layer(self, layer: int, measured: Measured) -> LayerExperts:
        frequency_E = self.choices_E[layer] / self.choices_E[layer].sum()
        spread = frequency_E.std(correction=0) / frequency_E.mean()
        return LayerExperts(
            selection_frequency=frequency_E.tolist(),
            balance=1 - spread.item(),
            loss=measured.losses[ZeroExperts(layer).name],
            relative_loss_increase=measured.increase(ZeroExperts(layer)),
        )
