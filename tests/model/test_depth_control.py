"""Each remedy against the formula of its paper, in plain PyTorch and float64: outputs, gradients, what is measured."""

import math
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecod_mcore import platform

platform.prepare()

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm  # noqa: E402
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.mlp import MLP  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402

from sparsecod_mcore.errors import UserError  # noqa: E402
from sparsecod_mcore.jvp import layer_jvp  # noqa: E402
from sparsecod_mcore.jvp.exact import directional_sums  # noqa: E402
from sparsecod_mcore.model.build import build_model, evaluation_arguments  # noqa: E402
from sparsecod_mcore.model.deepnorm import scale_initial_weights, value_rows  # noqa: E402
from sparsecod_mcore.model.depth_control import DepthControl  # noqa: E402
from sparsecod_mcore.model.residual import bind_residual_adds  # noqa: E402
from sparsecod_mcore.model.unfused import with_separate_norms  # noqa: E402
from sparsecod_mcore.monitor.buffer import MomentsBuffer  # noqa: E402
from sparsecod_mcore.monitor.statistics import LayerStatistics, layer_statistics  # noqa: E402
from tests.jvp.models import GQA, MOE, one_process, random_model  # noqa: E402

S, B, D, L = 5, 2, 16, 4
SHARE = 0.5
NORMED = ("layernorm_scaling", "mix_ln", "deepnorm", "sandwich_norm")


@pytest.fixture(autouse=True, scope="module")
def process() -> Iterator[None]:
    with one_process():
        yield


def model_of(kind: str, **overrides: Any) -> GPTModel:
    return random_model(layers=L, control=DepthControl(kind, SHARE), **GQA, **overrides)


def hidden_states() -> Tensor:
    torch.manual_seed(5)
    return torch.randn(S, B, D, dtype=torch.float64, requires_grad=True)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attention(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Causal attention of 4 heads in 2 groups, 4 wide, without positions."""
    mixed = (x @ weights["self_attention.linear_qkv.weight"].T).unflatten(-1, (2, 4, 4))
    q, k, v = (part.permute(1, 2, 3, 0, 4) for part in mixed.split([2, 1, 1], 3))
    scores = (q @ k.mT) / 2
    context = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf).softmax(-1) @ v
    return context.permute(3, 0, 1, 2, 4).flatten(2) @ weights["self_attention.linear_proj.weight"].T


def mlp(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up = (x @ weights["mlp.linear_fc1.weight"].T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ weights["mlp.linear_fc2.weight"].T


def restated(model: GPTModel, kind: str, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """What the decoder puts out, and what enters each layer, is there after attention, and leaves it."""
    streams = []
    for number, layer in enumerate(model.decoder.layers, start=1):
        weights = dict(layer.named_parameters())
        streams.append([x])
        for f, before, add in (
            (attention, "input_layernorm", "self_attn_bda"),
            (mlp, "pre_mlp_layernorm", "mlp_bda"),
        ):
            if kind == "deepnorm":
                x = rms((2 * L) ** 0.25 * x + f(weights, x), weights[f"{add}.norm.weight"])
            elif kind == "mix_ln" and number <= SHARE * L:
                x = rms(x + f(weights, x), weights[f"{add}.norm.weight"])
            elif kind == "layernorm_scaling":
                x = x + f(weights, rms(x, weights[f"{before}.norm.weight"]) / math.sqrt(number))
            elif kind == "sandwich_norm":
                y = f(weights, rms(x, weights[f"{before}.weight"]))
                x = x + rms(y, weights[f"{add}.norm.weight"])
            else:
                x = x + f(weights, rms(x, weights[f"{before}.weight"]))
            streams[-1].append(x)
    return (x if kind == "deepnorm" else rms(x, model.decoder.final_layernorm.weight)), streams


def gradients(output: Tensor, model: GPTModel, hidden: Tensor) -> list[Tensor]:
    torch.manual_seed(6)
    return list(torch.autograd.grad((output * torch.randn_like(output)).sum(), [hidden, *model.decoder.parameters()]))


@pytest.mark.parametrize("kind", ["none", "scaled_init", *NORMED])
def test_outputs_and_gradients_equal_the_formula(kind: str) -> None:
    model, hidden = model_of(kind), hidden_states()
    expected, _ = restated(model, kind, hidden)
    output = model.decoder(hidden, attention_mask=None)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(gradients(output, model, hidden), gradients(expected, model, hidden), strict=True):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    other = "none" if kind != "none" else "layernorm_scaling"
    if kind != "scaled_init":
        with pytest.raises((KeyError, AssertionError)):  # what would be another remedy is told apart
            torch.testing.assert_close(output, restated(model, other, hidden)[0])


def measured(model: GPTModel, hidden: Tensor) -> tuple[Tensor, LayerStatistics]:
    """The output of a training forward, whose backward is run as well."""
    buffer = MomentsBuffer(1, L, "cpu")
    buffer.begin(1)
    bind_residual_adds([model], buffer)
    output = model.decoder(hidden, attention_mask=None)
    output.sum().backward()
    return output, layer_statistics(buffer.moments_ILAM[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", NORMED)
def test_the_stream_is_measured_as_it_flows(kind: str, recompute: bool) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
    model, hidden = model_of(kind, **(full if recompute else {})), hidden_states()
    output, statistics = measured(model, hidden)
    expected, streams = restated(model, kind, hidden)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)  # measuring changes nothing

    def variance(x: Tensor) -> float:
        return x.var(-1, correction=0).mean().item()

    for layer, (before, middle, after) in enumerate(streams):
        for stream, branch, shortcut, y in (
            ("after_attention", "attention", before, middle),
            ("layer_output", "mlp", middle, after),
        ):
            found = {name: value[layer].item() for (of, name), value in statistics.items() if of == stream}
            assert found["tokens"] == S * B
            assert found["variance"] == pytest.approx(variance(y), rel=1e-6)
            assert found["shortcut_variance"] == pytest.approx(variance(shortcut), rel=1e-6)
            added = statistics[branch, "variance"][layer].item()
            assert added == pytest.approx(variance(y - shortcut), rel=1e-6)
            parts = found["shortcut_variance"] + added + 2 * found["covariance"]
            assert found["variance"] == pytest.approx(parts, rel=1e-6)


@pytest.mark.parametrize("kind", NORMED)
def test_jacobians_equal_autograd(kind: str) -> None:
    model, hidden = model_of(kind), hidden_states().detach()
    layer, rotary = model.decoder.layers[1], model.rotary_pos_emb(S)
    tangents = torch.randn(3, S, B, D, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        return layer(hidden_states=x, attention_mask=None, rotary_pos_emb=rotary)[0]

    jacobian = torch.autograd.functional.jacobian(run, hidden).view(hidden.numel(), -1)
    output, found = layer_jvp(layer, hidden, tangents, rotary)
    torch.testing.assert_close(output, run(hidden), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.flatten(1), tangents.flatten(1) @ jacobian.T, rtol=1e-8, atol=1e-8)
    shared = tangents[:, 0, 0]
    everywhere = shared[:, None, None].expand_as(tangents)
    expected = (everywhere.flatten(1) @ jacobian.T).view_as(tangents) - everywhere
    sums = directional_sums(layer, hidden, shared, rotary)
    torch.testing.assert_close(sums, expected.sum((1, 2)), rtol=1e-7, atol=1e-7)


def test_layers_are_counted_over_the_whole_model() -> None:
    """As a pipeline stage would build layers 3 and 4 of 4."""
    model = model_of("none")
    for kind, expected in (("layernorm_scaling", [3**-0.5, 4**-0.5]), ("mix_ln", [False, False])):
        spec = SimpleNamespace(layer_specs=[_spec_of(layer) for layer in model.decoder.layers[:2]])
        DepthControl(kind, SHARE).apply(spec, model.config, 2)  # type: ignore[arg-type]
        norms = [layer.submodules.input_layernorm for layer in spec.layer_specs]
        found = [norm.args[1] if kind == "layernorm_scaling" else norm is IdentityOp for norm in norms]
        assert found == pytest.approx(expected)


def _spec_of(layer: Any) -> ModuleSpec:
    return ModuleSpec(type(layer), submodules=layer.submodules_config)


@pytest.mark.parametrize("experts", [{}, MOE])
def test_checkpoints_keep_their_names(experts: dict[str, Any]) -> None:
    def names(kind: str) -> set[str]:
        return {tensor.key for tensor in model_of(kind, **experts).sharded_state_dict().values() if tensor is not None}

    plain = names("none")
    assert names("layernorm_scaling") == names("mix_ln") == plain
    assert plain - names("deepnorm") == {"decoder.final_layernorm.weight"}
    own = {f"decoder.layers.{add}.norm.weight" for add in ("self_attn_bda", "mlp_bda")}
    assert names("sandwich_norm") - plain == own


def test_initialisation() -> None:
    """Of the weights that write to the stream: std σ, σ/√(2L), and with DeepNorm σβ, as values and MLPs have it."""
    config = random_model(layers=L, output_layer_init_method=None, init_method_std=0.3).config
    for kind, std in (("scaled_init", 0.3 / math.sqrt(2 * L)), ("none", 0.3), ("layernorm_scaling", 0.3)):
        DepthControl(kind).set_initialisation(config)
        assert config.output_layer_init_method.keywords["std"] == pytest.approx(std)
    for experts in ({}, MOE):
        model = model_of("deepnorm", **experts)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        assert scale_initial_weights([model]) == [model]
        beta, scaled = (8 * L) ** -0.25, 0
        for name, weight in model.named_parameters():
            expected = before[name]
            if "linear_qkv" in name:  # each group: 2 queries, key, value, 4 rows each
                expected = expected.unflatten(0, (2, 4, 4)).clone()
                expected[:, 3] *= beta
                expected = expected.flatten(0, 2)
            elif "linear_proj" in name or "linear_fc" in name:
                expected = expected * beta
            scaled += not torch.equal(expected, before[name])
            torch.testing.assert_close(weight, expected)
        assert scaled == L * (4 if not experts else 2 + 2 * experts["num_moe_experts"])


def test_rows_of_values_are_found_on_every_rank() -> None:
    """Also where a query group is spread over two ranks: 2 queries, key, value, 4 rows each."""
    config = SimpleNamespace(num_query_groups=2, num_attention_heads=4)
    for ranks in (1, 2, 4):
        of_ranks = []
        for rank in range(ranks):
            group = SimpleNamespace(tp=SimpleNamespace(rank=lambda rank=rank: rank))
            projection = SimpleNamespace(weight=torch.zeros(32 // ranks, D))
            attention: Any = SimpleNamespace(
                config=config, linear_qkv=projection, hidden_size_per_attention_head=4, pg_collection=group
            )
            of_ranks.append(value_rows(attention))
        assert torch.cat(of_ranks).nonzero().flatten().tolist() == [12, 13, 14, 15, 28, 29, 30, 31]


def test_norms_fused_by_transformer_engine_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """On its specs alone, which can be had without it."""
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", TESpecProvider)
    engine = gpt_layer_specs.get_gpt_layer_with_transformer_engine_submodules
    dense = with_separate_norms(engine())
    assert dense.input_layernorm is TENorm and dense.pre_mlp_layernorm is TENorm
    assert dense.self_attention.submodules.linear_qkv is TEColumnParallelLinear
    assert dense.mlp.func.__self__ is MLP and dense.mlp.keywords["submodules"].linear_fc1 is TEColumnParallelLinear
    local = gpt_layer_specs.get_gpt_layer_local_submodules(normalization="RMSNorm")
    assert dense.sharded_state_dict_keys_map.items() >= local.sharded_state_dict_keys_map.items()
    moe = with_separate_norms(engine(num_experts=4))
    assert moe.input_layernorm is TENorm and moe.pre_mlp_layernorm is engine(num_experts=4).pre_mlp_layernorm
    assert "pre_mlp_layernorm." not in moe.sharded_state_dict_keys_map
    with pytest.raises(UserError, match="attention has its norm inside"):
        with_separate_norms(engine(multi_latent_attention=True, mla_down_proj_fusion=True))


@pytest.mark.parametrize(
    ("control", "overrides", "said"),
    [
        (DepthControl("mix_ln", 0.2), {}, "mix_ln_share 0.2 of 4 layers is not one layer; 0.25 or more is accepted"),
        (DepthControl("deepnorm"), {"fp8_param": True}, "which fp8_param does not allow"),
        (DepthControl("mix_ln"), {"fused_residual_rmsnorm": True}, "mix_ln cannot be had with fused_residual_rmsnorm"),
        (DepthControl("deepnorm"), {"transformer_impl": "inference_optimized"}, "cannot be had with transformer_impl"),
    ],
)
def test_what_cannot_be_had_is_refused(control: DepthControl, overrides: dict[str, Any], said: str) -> None:
    config = random_model(layers=L).config
    for name, value in overrides.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=said):
        control.check(config, training=True)


def test_a_checkpoints_arguments_bring_the_remedy_back() -> None:
    settings = {
        "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 40, "num_attention_heads": 4, "swiglu": True,
        "max_position_embeddings": 8, "normalization": "RMSNorm", "add_bias_linear": False, "vocab_size": 64,
        "padded_vocab_size": 64, "position_embedding_type": "rope",
    }  # fmt: skip
    built = build_model(evaluation_arguments(settings | {"cod_depth_control": "layernorm_scaling"}, torch.float32))
    assert [layer.input_layernorm.scale for layer in built.decoder.layers] == pytest.approx([1.0, 2**-0.5])
    assert DepthControl.of(Namespace()) == DepthControl("scaled_init", 0.25)
