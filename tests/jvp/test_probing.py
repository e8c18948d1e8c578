"""Probes that ride on training's forward passes find what probes of the same inputs find alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsecod_mcore.jvp.directions import Noise, place_of_this_rank
from sparsecod_mcore.jvp.probes import Probing, probe_layer
from sparsecod_mcore.jvp.statistics import jacobian_statistics, reduce_over_ranks
from sparsecod_mcore.train.probing import JacobianProbes
from tests.jvp.models import GQA, MOE, SHARED_EXPERT, random_model

S, B, D, LAYERS = 6, 2, 16, 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("overrides", [GQA, GQA | MOE | SHARED_EXPERT], ids=["dense", "moe"])
def test_probes_in_training(overrides: dict[str, Any], dropout: float) -> None:
    model = random_model(layers=LAYERS, **overrides, attention_dropout=dropout)
    args: Any = SimpleNamespace(
        cod_jacobian_interval=5, cod_jacobian_probes=3, cod_jacobian_directions="residual", num_layers=LAYERS,
        hidden_size=D, micro_batch_size=B, seq_length=S, seed=7, sequence_parallel=False, cuda_graph_impl="none",
        attention_dropout=dropout, hidden_dropout=0.0,
    )  # fmt: skip
    probes = JacobianProbes(args, [model], replicated=False)
    inputs: dict[int, torch.Tensor] = {}

    def keep(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.setdefault(layer.layer_number - 1, kwargs["hidden_states"].detach())

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(keep, with_kwargs=True)
    tokens, positions = torch.randint(0, 64, (B, S)), torch.arange(S).expand(B, S)
    for iteration in (4, 5):
        probes.begin_step(iteration)
        inputs.clear()
        for _ in range(2):  # microbatches, of which the first is probed
            model(tokens, positions, None, labels=tokens).sum().backward()
            tokens = tokens.flip(1)
        probes.end_step()
    ((iteration, found),) = probes.collect().items()
    assert iteration == 5 and not probes.collect()

    probing = Probing(3, B, along_residual=True)
    sums = probing.zeros(LAYERS, D, B, torch.device("cpu"))
    for number, hidden in inputs.items():
        noise = Noise(7, 5, number, torch.device("cpu"), torch.float64)
        layer, rotary = model.decoder.layers[number], model.rotary_pos_emb(S)
        probe_layer(layer, hidden, rotary, probing, noise, place_of_this_rank(S, B, False), sums)
    expected = jacobian_statistics(*reduce_over_ranks(sums, S, replicated=False), along_residual=True)
    assert found.keys() == expected.keys()
    for key, value_L in expected.items():
        torch.testing.assert_close(found[key], value_L, msg=str(key))
