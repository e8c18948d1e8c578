"""Models that this project trains, as Hugging Face models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from sparsecod_mcore.config import build_parser, with_config
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.exchange.convert import Request, convert
from sparsecod_mcore.exchange.families import find_family
from sparsecod_mcore.model.build import complete_arguments
from tests.distributed.jobs import REPOSITORY
from tests.exchange import families, megatron_side
from tests.scoring.random_models import GQA, MOE, random_tokens, save_random_checkpoint

ALL_MOE = MOE | {"moe_layer_freq": 1}
WITHOUT_SHARED = ALL_MOE | {"moe_shared_expert_intermediate_size": None}


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ("micro", "LlamaForCausalLM"),
        ("dense_1b", "LlamaForCausalLM"),
        ("micro_moe", "Qwen2MoeForCausalLM"),
    ],
)
def test_example_configurations_have_a_family(config: str, architecture: str) -> None:
    flags = with_config(["--config", str(REPOSITORY / "examples" / "configs" / f"{config}.yaml")])
    args = build_parser().parse_args(flags)
    args.vocab_size = 1000
    family, written = find_family(vars(args))
    assert family.architecture == architecture
    assert written["num_hidden_layers"] == args.num_layers and written["rms_norm_eps"] == 1e-6


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "dense": (GQA, "LlamaForCausalLM"),
    "dense, tied": (GQA | {"untie_embeddings_and_output_weights": False}, "LlamaForCausalLM"),
    "qkv bias": (GQA | {"add_qkv_bias": True}, "Qwen2ForCausalLM"),
    "qk norm": (GQA | {"qk_layernorm": True}, "Qwen3ForCausalLM"),
    "experts": (WITHOUT_SHARED, "MixtralForCausalLM"),
    "experts, qk norm of all heads": (
        WITHOUT_SHARED | {"kv_channels": 8, "qk_layernorm": True, "cod_full_width_qk_norm": True},
        "OlmoeForCausalLM",
    ),
    "shared expert": (MOE, "Qwen2MoeForCausalLM"),
    "gated shared expert": (ALL_MOE | {"moe_shared_expert_gate": True}, "Qwen2MoeForCausalLM"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_function(name: str, tmp_path: Path) -> None:
    """Without the rows that pad the vocabulary, which no token has."""
    settings, architecture = MODELS[name]
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    stack = save_random_checkpoint(settings, checkpoint)
    tokens = random_tokens(3, 40)
    expected = megatron_side.stack_logits(stack, tokens)[..., :97]
    convert(Request(model=checkpoint, out=out))
    model = families.load(out)
    assert type(model).__name__ == architecture and model.config.vocab_size == 97
    torch.testing.assert_close(families.logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    if name == "shared expert":  # its gate, which is given to it, is a shared expert's with a gate, back in Megatron
        found = megatron_side.logits(out, tokens, 97)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "position_embedding_type": (GQA | {"position_embedding_type": "learned_absolute"}, "is 'learned_absolute'"),
    "normalization": (GQA | {"normalization": "LayerNorm"}, "is 'LayerNorm', which the closest, llama, has 'RMSNorm'"),
    "swiglu": (GQA | {"swiglu": False}, "is False"),
    "add_bias_linear": (GQA | {"add_bias_linear": True}, "is True"),
    "attention_output_gate": (GQA | {"attention_output_gate": True}, "is True"),
    "qk_l2_norm": (GQA | {"qk_l2_norm": True}, "is True"),
    "moe_router_pre_softmax": (
        WITHOUT_SHARED | {"moe_router_pre_softmax": True},
        "is True, which the closest, mixtral",
    ),
    "moe_router_score_function": (MOE | {"moe_router_score_function": "sigmoid"}, "is 'sigmoid'"),
    "moe_mlp_glu_interleave_size": (MOE | {"moe_mlp_glu_interleave_size": 4}, "is 4"),
    "cod_depth_control": (GQA | {"cod_depth_control": "layernorm_scaling"}, "is 'layernorm_scaling'"),
    "moe_expert_capacity_factor": (MOE | {"moe_expert_capacity_factor": 1.0}, "is 1.0"),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_no_family_computes_is_refused(flag: str) -> None:
    settings, complaint = REFUSED[flag]
    with pytest.raises(UserError, match=rf"^no supported family computes what this model does: {flag} {complaint}"):
        find_family(vars(complete_arguments(settings, torch.float32)))


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    """A run's tokenizer.json, with the token that ended its documents, makes a tokenizer for `transformers`."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<|endoftext|>": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    settings = GQA | {"cod_tokenizer": str(tmp_path / "words.json"), "null_tokenizer_eod_id": 2}
    save_random_checkpoint(settings, tmp_path / "checkpoint")
    convert(Request(model=tmp_path / "checkpoint", out=tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert tokenizer("b a b")["input_ids"] == [1, 0, 1]
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 2
    names = ("config.json", "generation_config.json")
    config, generation = (json.loads((tmp_path / "out" / name).read_text()) for name in names)
    assert config["eos_token_id"] == generation["eos_token_id"] == 2 and config["bos_token_id"] is None
    model = families.load(tmp_path / "out")
    assert model.generation_config.eos_token_id == 2
    other = tmp_path / "other.json"
    other.write_bytes((tmp_path / "words.json").read_bytes())
    (tmp_path / "words.json").unlink()
    convert(Request(model=tmp_path / "checkpoint", out=tmp_path / "without"))
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    convert(Request(model=tmp_path / "checkpoint", out=tmp_path / "with", tokenizer=other))
    assert (tmp_path / "with" / "tokenizer.json").read_bytes() == other.read_bytes()
    (tmp_path / "config.yaml").write_text(f"cod:\n  tokenizer: {other}\n")  # what the run says comes before
    convert(Request(model=tmp_path / "checkpoint", out=tmp_path / "named"))
    assert (tmp_path / "named" / "tokenizer.json").read_bytes() == other.read_bytes()
    Tokenizer(models.WordLevel({"a": 0, "b": 97}, unk_token="a")).save(str(other))
    with pytest.raises(UserError, match=r"other\.json has 98 tokens, more than the vocabulary of 97 of the model"):
        convert(Request(model=tmp_path / "checkpoint", out=tmp_path / "too many"))
