"""Jacobian probes during training: after a layer's forward pass of one microbatch of a step, on that layer's input."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.jvp.directions import Noise, place_of_this_rank
from sparsecod_mcore.jvp.layer import rehearse
from sparsecod_mcore.jvp.probes import Probing, probe_layer
from sparsecod_mcore.jvp.rules import known_outputs
from sparsecod_mcore.jvp.statistics import jacobian_statistics, reduce_over_ranks
from sparsecod_mcore.monitor.statistics import LayerStatistics


class JacobianProbes:
    """Probes every layer once in each step that is a multiple of the interval; an instrument of the monitor.

    The first microbatch is probed, behind the layer's own forward pass, when its weights are sure to be gathered.
    Training takes no notice: nothing of its tensors, its random state or its gradients is touched.
    """

    def __init__(self, args: Namespace, model_chunks: Sequence[MegatronModule], *, replicated: bool) -> None:
        """`replicated`: another rank holds the very same tokens. Raises UserError for models that have no rules."""
        in_pieces = getattr(args, "overlap_moe_expert_parallel_comm", False)
        if in_pieces or getattr(args, "cuda_graph_impl", "none") != "none":
            raise UserError(
                "Jacobian probes need layers that run as modules, neither in CUDA graphs (cuda_graph_impl) nor in "
                "pieces (overlap_moe_expert_parallel_comm): set cod.jacobian_interval to 0"
            )
        self._interval = args.cod_jacobian_interval
        self._sequence_parallel = args.sequence_parallel
        self._sequence_length, self._seed = args.seq_length, args.seed
        self._replicated = replicated
        num_sequences = args.micro_batch_size * parallel_state.get_data_parallel_world_size()
        along_residual = args.cod_jacobian_directions == "residual"
        self._probing = Probing(args.cod_jacobian_probes, num_sequences, along_residual)
        self._sums = self._probing.zeros(
            args.num_layers, args.hidden_size, args.micro_batch_size, torch.cuda.current_device()
        )
        self._measured: int | None = None
        self._waiting: set[int] = set()
        self._outputs: dict[torch.nn.Module, torch.Tensor] = {}  # of the layer that is running
        self._layers = {layer.layer_number - 1: layer for layer in _layers(model_chunks)}
        for number, layer in self._layers.items():
            rehearse(layer)
            layer.register_forward_hook(partial(self._after_layer, number), with_kwargs=True)
            for linear in () if args.attention_dropout or args.hidden_dropout else _linear_layers(layer):
                linear.register_forward_hook(partial(self._keep_output, number))

    def begin_step(self, iteration: int) -> None:
        """Probe in this step if it is its turn."""
        if iteration % self._interval == 0:
            self._measured = iteration
            self._waiting = set(self._layers)

    def end_step(self) -> None:
        """No more probes until the next step."""
        self._waiting.clear()

    def must_collect_before(self, iteration: int) -> bool:
        """There is room for one step."""
        return self._measured is not None and iteration % self._interval == 0

    def _keep_output(self, number: int, linear: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> None:
        if number in self._waiting:
            self._outputs[linear] = output[0].detach()

    def _after_layer(
        self, number: int, layer: TransformerLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if number not in self._waiting or not layer.training:
            return
        self._waiting.remove(number)  # recomputation and further microbatches run the layer again
        assert self._measured is not None
        hidden_SBD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        hidden_SBD = hidden_SBD.detach()
        num_positions, batch_size, _ = hidden_SBD.shape
        with known_outputs(self._outputs):
            probe_layer(
                layer,
                hidden_SBD,
                kwargs.get("rotary_pos_emb"),
                self._probing,
                Noise(self._seed, self._measured, number, hidden_SBD.device, hidden_SBD.dtype),
                place_of_this_rank(num_positions, batch_size, self._sequence_parallel),
                self._sums,
            )
        self._outputs.clear()

    def collect(self) -> dict[int, LayerStatistics]:
        """The statistics of the step that was probed since the last call, if one was. Collective over all ranks."""
        if self._measured is None:
            return {}
        iteration, self._measured = self._measured, None
        sums, sequences_L = reduce_over_ranks(self._sums, self._sequence_length, replicated=self._replicated)
        self._sums.zero_()
        along = self._probing.along_residual
        statistics = jacobian_statistics(sums, sequences_L, along_residual=along)
        return {iteration: {key: value_L.cpu() for key, value_L in statistics.items()}}


def _linear_layers(layer: TransformerLayer) -> Iterator[torch.nn.Module]:
    """Those that see all tokens as they are, and whose outputs probes need not compute again."""
    yield from (layer.self_attention.linear_qkv, layer.self_attention.linear_proj)
    if type(layer.mlp) is MLP:
        yield from (layer.mlp.linear_fc1, layer.mlp.linear_fc2)


def _layers(model_chunks: Sequence[MegatronModule]) -> Iterator[TransformerLayer]:
    for chunk in model_chunks:
        yield from chunk.decoder.layers
