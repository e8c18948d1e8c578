"""Random models of every family, made and run by Hugging Face's own code."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What distinguishes each from the defaults.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "head_dim": 12},
    "mistral": {"sliding_window": 48},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"head_dim": 12},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": EXPERTS,
    "olmoe renormalised": EXPERTS | {"norm_topk_prob": True},
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "mlp_only_layers": [1]},
}


def random_model(name: str) -> PreTrainedModel:
    """Biases and norms too are random: those of new models are zeros and ones."""
    config = AutoConfig.for_model(name.split()[0], **SIZES | FAMILIES[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def load(folder: Path) -> PreTrainedModel:
    """What from_pretrained makes of a folder; nothing may be missing, left over or new."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    return model(tokens_BS).logits


def continuation(model: PreTrainedModel, tokens_BS: torch.Tensor) -> list[list[int]]:
    """Twelve tokens more, greedily."""
    mask = torch.ones_like(tokens_BS)
    return model.generate(tokens_BS, attention_mask=mask, max_new_tokens=12, do_sample=False).tolist()
