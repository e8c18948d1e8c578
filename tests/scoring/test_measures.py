"""Measures of a model at rest, against plain float64 computations that keep everything in memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecod_mcore.scoring.attention import AttentionMeter
from sparsecod_mcore.scoring.moments import MomentsMeter
from sparsecod_mcore.scoring.results import SPARSITY_THRESHOLDS
from sparsecod_mcore.scoring.stack import Stack
from sparsecod_mcore.scoring.weights import weight_sparsity
from tests.scoring.random_models import GQA, MOE, random_stack, random_tokens

MODELS = {"gqa": GQA, "moe": MOE}
PARTIAL = 8192 * 8192 * 2  # bytes of one head's weights over 8192 tokens, in half precision


@pytest.fixture(params=MODELS)
def stack(request: pytest.FixtureRequest) -> Stack:
    return random_stack(MODELS[request.param])


def run(stack: Stack, tokens_BS: torch.Tensor, measuring: AbstractContextManager[None]) -> list[torch.Tensor]:
    """What enters every layer, and what the last one gives."""
    with measuring:
        hidden = [stack.embed(tokens_BS)]
        for layer in range(stack.num_layers):
            hidden.append(stack.layer(layer, hidden[-1]))
    return hidden


def rotated(x_SBNH: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021), halves paired."""
    length, width = x_SBNH.shape[0], x_SBNH.shape[-1]
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_S11H = (torch.arange(length, dtype=torch.float64)[:, None] * frequency)[:, None, None]
    first, second = x_SBNH.chunk(2, -1)
    return torch.cat(
        [first * angle_S11H.cos() - second * angle_S11H.sin(), second * angle_S11H.cos() + first * angle_S11H.sin()], -1
    )


def plain_attention(stack: Stack, layer: int, hidden_SBD: torch.Tensor) -> torch.Tensor:
    """Attention weights [B, N, S, S] in float64, from the weights of a layer."""
    config = stack.model.config
    attention = stack.layers[layer].self_attention
    x_SBD = hidden_SBD.double()
    x_SBD = x_SBD / (x_SBD.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt()
    x_SBD = x_SBD * stack.layers[layer].input_layernorm.weight.double()
    groups, per_group = config.num_query_groups, config.num_attention_heads // config.num_query_groups
    qkv = (x_SBD @ attention.linear_qkv.weight.double().T).unflatten(-1, (groups, per_group + 2, config.kv_channels))
    base = stack.model.rotary_pos_emb.inv_freq[1].double().item() ** (-config.kv_channels / 2)
    q_SBNH = rotated(qkv[..., :per_group, :].flatten(2, 3), base)
    k_SBNH = rotated(qkv[..., per_group, :].repeat_interleave(per_group, 2), base)
    scores_BNST = torch.einsum("sbnh,tbnh->bnst", q_SBNH, k_SBNH) / config.kv_channels**0.5
    visible_ST = torch.ones(scores_BNST.shape[-2:]).tril().bool()
    return scores_BNST.masked_fill(~visible_ST, -torch.inf).softmax(-1)


def test_attention_of_every_head(stack: Stack) -> None:
    tokens_BS = random_tokens(5, 97)
    meter = AttentionMeter(stack)
    first, second = (run(stack, batch_BS, meter.measuring()) for batch_BS in tokens_BS.split(3))
    result = meter.result()
    visible_ST = torch.ones(97, 97).tril().bool()
    for layer in range(stack.num_layers):
        weights = plain_attention(stack, layer, torch.cat([first[layer], second[layer]], dim=1))
        entropy_N = torch.special.entr(weights).sum(-1).mean((0, 2))
        np.testing.assert_allclose(result.entropy_heads[layer], entropy_N, rtol=1e-5)
        np.testing.assert_allclose(result.entropy[layer], entropy_N.mean(), rtol=1e-5)
        seen = weights[..., visible_ST]
        for threshold in SPARSITY_THRESHOLDS:
            # Rounding may carry only what is next to the threshold across it.
            doubtful_N = ((seen / threshold - 1).abs() < 1e-4).double().mean((0, 2))
            share_N = (seen < threshold).double().mean((0, 2))
            found_N = np.array(result.sparsity_causal_heads[str(threshold)][layer])
            assert (abs(found_N - share_N.numpy()) <= doubtful_N.numpy() + 1e-12).all()
            assert share_N.min() > 0 and share_N.max() < 1, "a threshold that tells nothing"
            assert result.sparsity_causal[str(threshold)][layer] == pytest.approx(found_N.mean())
            full = (weights < threshold).double().mean().item()
            doubtful = doubtful_N.mean().item() + 1e-12
            assert result.sparsity_full[str(threshold)][layer] == pytest.approx(full, abs=doubtful)
    assert result.sequences == 5
    assert result.entropy_mean == pytest.approx(np.mean(result.entropy))


def test_weights_of_every_tensor(stack: Stack) -> None:
    result = weight_sparsity(stack)
    counts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in stack.model.named_parameters():
        rows = 97 if "embedding" in name or "output_layer" in name else None  # the rest pads
        if "local_experts" in name:
            head, _, tail = name.partition("local_experts.")
            name = head + tail.split(".", 1)[1]
        counts.setdefault(name, []).append(parameter[:rows].double().abs().flatten())
    assert list(result.tensors) == list(counts)
    whole = {name: torch.cat(parts) for name, parts in counts.items()}
    for threshold in map(str, SPARSITY_THRESHOLDS):
        for name, values in whole.items():
            assert result.tensors[name].parameters == len(values)
            assert result.tensors[name].sparsity[threshold] == (values < float(threshold)).double().mean()
        for layer in range(stack.num_layers):
            of_layer = [values for name, values in whole.items() if f".layers.{layer}." in name]
            assert result.layers[threshold][layer] == (torch.cat(of_layer) < float(threshold)).double().mean()
        everything = torch.cat(list(whole.values()))
        assert result.model[threshold] == (everything < float(threshold)).double().mean()
    assert result.model["0.01"] > 0


def test_moments_of_every_stream(stack: Stack) -> None:
    tokens_BS = random_tokens(5, 33)
    meter = MomentsMeter(stack)
    after_attention: list[torch.Tensor] = []
    hooks = [
        layer.pre_mlp_layernorm.register_forward_pre_hook(lambda _, args: after_attention.append(args[0]))
        for layer in stack.layers
    ]
    first, second = (run(stack, batch_BS, meter.measuring()) for batch_BS in tokens_BS.split(3))
    for hook in hooks:
        hook.remove()
    result = meter.result(5, 33)
    L = stack.num_layers

    def joined(parts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        return iter([torch.cat([part.double().flatten(0, 1) for part in pair]) for pair in parts])

    hidden = list(joined(list(zip(first, second, strict=True))))
    middle = list(joined(list(zip(after_attention[:L], after_attention[L:], strict=True))))
    assert result.embedding["variance"] == pytest.approx(hidden[0].var(-1, correction=0).mean().item(), rel=1e-5)
    assert result.embedding["dimension_kurtosis"] == pytest.approx(kurtosis(hidden[0]), rel=1e-4)
    for layer in range(L):
        streams = {
            "attention": middle[layer] - hidden[layer],
            "after_attention": middle[layer],
            "mlp": hidden[layer + 1] - middle[layer],
            "layer_output": hidden[layer + 1],
        }
        for stream, x_TD in streams.items():
            found = {name: values[layer] for name, values in result.streams[stream].items()}
            centred_TD = x_TD - x_TD.mean(-1, keepdim=True)
            per_token_T = (centred_TD**4).mean(-1) / (centred_TD**2).mean(-1) ** 2
            assert found["tokens"] == 5 * 33 and found["non_finite"] == 0
            assert found["variance"] == pytest.approx((centred_TD**2).mean().item(), rel=1e-4)
            assert found["kurtosis"] == pytest.approx(per_token_T.mean().item(), rel=1e-4)
            assert found["dimension_kurtosis"] == pytest.approx(kurtosis(x_TD), rel=1e-4)
        for branch, shortcut, stream in (
            ("attention", hidden[layer], "after_attention"),
            ("mlp", middle[layer], "layer_output"),
        ):
            f_TD, h_TD = (x - x.mean(-1, keepdim=True) for x in (streams[branch], shortcut))
            scale = (f_TD.square().mean() * h_TD.square().mean()).sqrt().item()
            found_covariance = result.streams[stream]["covariance"][layer]
            assert found_covariance == pytest.approx((f_TD * h_TD).mean().item(), abs=1e-5 * scale)
    stack.layer(0, first[0])  # what goes by now is not measured
    assert meter.result(5, 33) == result


def kurtosis(x_TD: torch.Tensor) -> float:
    """Eq. 20."""
    centred_TD = x_TD - x_TD.mean(0)
    return ((centred_TD**4).mean(0) / (centred_TD**2).mean(0) ** 2).mean().item()


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory can be told on Linux only")
def test_8192_tokens_need_no_matrix_of_weights() -> None:
    stack = random_stack(GQA | {"num_layers": 1, "num_query_groups": 3, "max_position_embeddings": 8192})
    tokens_BS = random_tokens(1, 8192)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_kib()
    meter = AttentionMeter(stack)
    run(stack, tokens_BS, meter.measuring())
    result = meter.result()
    assert (peak_kib() - before) * 1024 < PARTIAL / 2
    assert 0 < result.entropy_mean < np.log(8192)
