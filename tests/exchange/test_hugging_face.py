"""Hugging Face Llamas: what their files mean. That whole models come out right, the reference's scores show."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.exchange.decoder import decoder_settings, mixture_settings
from sparsecod_mcore.scoring.stack import load_stack, model_files

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}


def random_tensors() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    for layer in range(2):
        here = f"model.layers.{layer}"
        shapes |= {f"{here}.self_attn.{name}_proj.weight": (12, 16) for name in "kv"}
        shapes |= {f"{here}.self_attn.q_proj.weight": (24, 16), f"{here}.self_attn.o_proj.weight": (16, 24)}
        shapes |= {f"{here}.mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes |= {f"{here}.{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
        shapes[f"{here}.mlp.down_proj.weight"] = (16, 24)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(folder: Path, tensors: dict[str, torch.Tensor], parts: int = 1, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    names = sorted(tensors)
    files = {f"model-{part}.safetensors": names[part::parts] for part in range(parts)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    if parts > 1:
        weight_map = {name: file for file, held in files.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_weights_in_several_files(tmp_path: Path) -> None:
    """Untied output, rows of queries, keys and values group by group, gate before up."""
    tensors = random_tensors()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}  # kept by older files, and derived
    folder = save(tmp_path / "sharded", tensors | extra, parts=3)
    stack = load_stack(folder)
    assert [path.name for path in model_files(folder)] == ["config.json", *(f"model-{i}.safetensors" for i in range(3))]
    parameters = dict(stack.model.named_parameters())
    assert torch.equal(parameters["output_layer.weight"], tensors["lm_head.weight"])
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    rows = [q[:12], k[:6], v[:6], q[12:], k[6:], v[6:]]
    assert torch.equal(parameters["decoder.layers.1.self_attention.linear_qkv.weight"], torch.cat(rows))
    gate_up = [tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(parameters["decoder.layers.1.mlp.linear_fc1.weight"], torch.cat(gate_up))
    assert stack.model.config.layernorm_epsilon == 1e-6
    half = load_stack(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    losses_BS = half.losses(half.layer(0, half.embed(torch.zeros(1, 5, dtype=torch.long))), torch.ones(1, 5).long())
    assert losses_BS.dtype == torch.float32 and losses_BS.isfinite().all()


def frequencies(folder: Path) -> torch.Tensor:
    return load_stack(folder).model.rotary_pos_emb.inv_freq.double()


def test_rotary_embeddings(tmp_path: Path) -> None:
    tensors = random_tensors()
    plain = torch.tensor([500000.0 ** (-i / 6) for i in (0, 2, 4)], dtype=torch.float64)
    torch.testing.assert_close(frequencies(save(tmp_path / "top", tensors)), plain, rtol=1e-6, atol=0)
    newer = {"rope_theta": None, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    torch.testing.assert_close(frequencies(save(tmp_path / "newer", tensors, **newer)), plain, rtol=1e-6, atol=0)
    scaling = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}
    found = frequencies(save(tmp_path / "llama3", tensors, rope_scaling=scaling))

    def scaled(frequency: float) -> float:
        """Llama 3.1: as it is for wavelengths below 8192/4, divided by the factor above 8192, in between a mixture."""
        turns = 8192 * frequency / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
        return (1 - share) * frequency / 32 + share * frequency

    torch.testing.assert_close(found, torch.tensor([scaled(f) for f in plain.tolist()]).double(), rtol=1e-6, atol=0)
    assert found[-1] < plain[-1] / 30


def test_one_expert_whose_weight_is_always_one_is_refused() -> None:
    config = CONFIG | {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 1, "norm_topk_prob": True}
    with pytest.raises(UserError, match="num_experts_per_tok 1 is not supported where the weights of chosen experts"):
        mixture_settings(config, "num_experts", "moe_intermediate_size")
    alone = mixture_settings(config | {"norm_topk_prob": False}, "num_experts", "moe_intermediate_size")
    assert alone["moe_router_topk"] == 1 and alone["moe_router_pre_softmax"]


def test_settings() -> None:
    windowed = decoder_settings(CONFIG | {"model_type": "mistral", "sliding_window": 48})
    assert windowed["max_position_embeddings"] == 48  # up to which the window changes nothing
    assert decoder_settings(CONFIG | {"head_dim": None})["kv_channels"] == 4
    for change, complaint in (
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            "low_freq_factor 2.0 is not",
        ),
    ):
        with pytest.raises(UserError, match=complaint):
            decoder_settings(CONFIG | change)


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    with pytest.raises(
        UserError, match=r"has a tensor model\.layers\.2\.bias, which its config.json does not account for"
    ):
        load_stack(save(tmp_path / "more", tensors | {"model.layers.2.bias": torch.ones(3)}))
    with pytest.raises(
        UserError, match=r"embed_tokens.weight has the shape \[32, 16\], config.json implies \[40, 16\]"
    ):
        load_stack(save(tmp_path / "other", tensors, vocab_size=40))
