"""The rules of whole layers against the derivatives that autograd takes of Megatron's own modules, in float64."""

from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.jvp import Dual, jvp, layer_branches, layer_jvp
from sparsecod_mcore.jvp.layer import probe_branches, rehearse
from tests.jvp.models import GQA, MOE, MQA, SHARED_EXPERT, random_model

S, B, P = 5, 2, 3

MODELS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": GQA,
    "mqa": MQA,
    "interleaved_rotary": {"rotary_interleaved": True},
    "qk_norm": GQA | {"qk_layernorm": True},
    "qk_norm_of_all_heads": GQA | {"qk_layernorm": True, "full_width_qk_norm": True},
    "layer_norm": {"normalization": "LayerNorm", "add_bias_linear": True},
    "moe": MOE,
    "moe_shared_expert": GQA | MOE | SHARED_EXPERT,
    "moe_gated_shared_expert": MOE | SHARED_EXPERT | {"moe_shared_expert_gate": True},
    "moe_pre_softmax": MOE | {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 1.5},
    "moe_allgather": MOE | {"moe_token_dispatcher_type": "allgather"},
}


def jacobian(layer: torch.nn.Module, hidden: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and by one backward pass for each of its elements the whole Jacobian [S*B*D, S*B*D]."""
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
    rows = [torch.autograd.grad(y, hidden, retain_graph=True)[0].flatten() for y in output.flatten()]
    return output.detach(), torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_layer_jvp_equals_autograd(name: str) -> None:
    model = random_model(**MODELS[name])
    layer, rotary = model.decoder.layers[0], model.rotary_pos_emb(S)
    hidden = torch.randn(S, B, 16, dtype=torch.float64) * 2 + 0.5
    tangents = torch.randn(P, S, B, 16, dtype=torch.float64)
    output, jacobian_matrix = jacobian(layer, hidden, rotary)
    expected = (tangents.flatten(1) @ jacobian_matrix.T).view_as(tangents)
    found, found_tangents = layer_jvp(layer, hidden, tangents, rotary)
    torch.testing.assert_close(found, output, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found_tangents, expected, rtol=1e-8, atol=1e-8)
    branches = layer_branches(layer, Dual(hidden, tangents), rotary)
    assert all(branch.tangents.abs().max() > 0.1 for branch in branches), "a branch that does nothing proves nothing"
    torch.testing.assert_close(hidden + branches.attention.value + branches.mlp.value, found)


def test_the_training_forward_is_left_as_it_was() -> None:
    """Rules between a forward and its backward: neither the random state nor the gradients notice."""
    model = random_model(**MOE, **SHARED_EXPERT)
    layer, rotary = model.decoder.layers[0], model.rotary_pos_emb(S)
    hidden = torch.randn(S, B, 16, dtype=torch.float64, requires_grad=True)

    def gradients(probed: bool) -> list[Tensor]:
        output, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        if probed:
            layer_jvp(layer, hidden.detach(), hidden.detach()[None], rotary)
        return list(torch.autograd.grad(output.square().sum(), [hidden, *layer.parameters()]))

    state = torch.get_rng_state()
    expected = gradients(probed=False)
    found = gradients(probed=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, found, expected))


def test_a_module_without_a_rule_is_named() -> None:
    layer = random_model().decoder.layers[0]
    layer.mlp = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(UserError, match=r"no Jacobian rule for torch\.nn\.modules\.linear\.Bilinear: register one"):
        rehearse(layer)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"activation_func": torch.nn.functional.gelu}, "MLP does not know activations other than SwiGLU"),
        (MOE | {"moe_expert_capacity_factor": 1.0}, "MoELayer does not know moe_expert_capacity_factor"),
    ],
)
def test_what_a_rule_does_not_cover_is_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        rehearse(random_model(**overrides).decoder.layers[0])


class TwiceAnMLP(MLP):
    """What it does differs from its base class, whose rule must not stand in for its own."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        output, bias = super().forward(hidden_states, per_token_scale, **kwargs)
        return 2 * output, bias


def test_a_rule_can_be_added() -> None:
    layer = random_model().decoder.layers[0]
    hidden, tangents = torch.randn(S, B, 16, dtype=torch.float64), torch.randn(P, 16, dtype=torch.float64)
    once = probe_branches(layer, hidden, tangents)
    layer.mlp.__class__ = TwiceAnMLP
    for run in (partial(rehearse, layer), partial(probe_branches, layer, hidden, tangents)):
        with pytest.raises(UserError, match=r"no Jacobian rule for .*TwiceAnMLP"):
            run()

    @jvp.register
    def _(module: TwiceAnMLP, x: Dual) -> Dual:
        return jvp.dispatch(MLP)(copy_as_mlp(module), x).map(lambda t: 2 * t)

    def copy_as_mlp(module: TwiceAnMLP) -> MLP:
        plain = copy(module)
        plain.__class__ = MLP
        return plain

    twice = probe_branches(layer, hidden, tangents)
    torch.testing.assert_close(twice.attention_sums, once.attention_sums)
    torch.testing.assert_close(twice.mlp_sums, 2 * once.mlp_sums)


def test_transformer_engine_rules() -> None:
    """On modules that carry what Transformer Engine's do: the same numbers as from the local modules."""
    from sparsecod_mcore.jvp import transformer_engine as te

    torch.manual_seed(3)
    x = Dual(torch.randn(S, B, 16, dtype=torch.float64), torch.randn(P, S, B, 16, dtype=torch.float64))
    group = torch.distributed.group.WORLD
    gamma, weight, bias = torch.rand(16).double(), torch.randn(12, 16).double(), torch.randn(12).double()
    norm = {"eps": 1e-5, "zero_centered_gamma": True}
    fused: Any = SimpleNamespace(
        layer_norm_weight=gamma - 1, layer_norm_bias=None, normalization="RMSNorm", weight=weight, bias=bias,
        sequence_parallel=True, _tp_group=group, **norm,
    )  # fmt: skip
    found = te.layer_norm_linear(fused, x)

    def reference(value: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(value, (16,), gamma, 1e-5)
        return torch.nn.functional.linear(normed, weight, bias)

    check(found, reference, x)
    plain: Any = SimpleNamespace(weight=gamma - 1, bias=torch.ones(16).double(), **norm)
    check(te.norm(plain, x), lambda value: torch.nn.functional.layer_norm(value, (16,), gamma, plain.bias, 1e-5), x)
    row: Any = SimpleNamespace(weight=weight, bias=None, parallel_mode="row", sequence_parallel=False, _tp_group=group)
    check(te.linear(row, x), lambda value: torch.nn.functional.linear(value, weight), x)
    grouped: Any = SimpleNamespace(weight0=weight, weight1=-2 * weight)
    rows = x.map(lambda t: t.flatten(-3, -2))
    found = te.grouped_linear(grouped, rows, [4, 6])
    scale = torch.tensor([1.0] * 4 + [-2.0] * 6).double()[:, None]
    check(found, lambda value: scale * torch.nn.functional.linear(value, weight), rows)


def check(found: Dual, function: Any, x: Dual) -> None:
    torch.testing.assert_close(found.value, function(x.value), rtol=1e-10, atol=1e-10)
    for tangent, expected in zip(found.tangents, x.tangents, strict=True):
        _, reference = torch.func.jvp(function, (x.value,), (expected,))
        torch.testing.assert_close(tangent, reference, rtol=1e-10, atol=1e-10)
