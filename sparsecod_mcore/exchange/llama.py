"""Llama and Mistral: what their configuration means in Megatron's flags, and how their weights are laid out in it.

Axes: V vocabulary, D hidden width, F width of the MLP, N query heads, G key and value heads, H head width.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsecod_mcore.errors import UserError

MODEL_TYPES = ("llama", "mistral")

_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
)
_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim", "sliding_window")

# What Megatron's Llama 3 frequency scaling has fixed.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Weight:
    """A parameter of Megatron's, unsharded: the tensors it is made from, and how."""

    name: str
    sources: tuple[str, ...]
    merge: Callable[..., torch.Tensor] = lambda tensor: tensor


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments, by destination, for a ``config.json``. Raises `UserError` for what has no counterpart."""
    _check_numbers(config)
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {config['hidden_act']!r} is not supported for this family, 'silu' is")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UserError(f"{name}: true is not supported, weights without biases are")
    heads, positions = config["num_attention_heads"], config["max_position_embeddings"]
    if config.get("sliding_window"):  # within the window attention is plain
        positions = min(positions, config["sliding_window"])
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": positions,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"],
        **_rope(config),
    }


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for what is no number where one is needed, `KeyError` for what is not there."""
    for name in (*_COUNTS, *_OPTIONAL_COUNTS):
        value = config[name] if name in _COUNTS else config.get(name)
        if value is None and name in _OPTIONAL_COUNTS:
            continue
        if type(value) is not int or value < 1:
            raise UserError(f"{name} is {value!r}, not a whole number of 1 or more")
    if not isinstance(config["rms_norm_eps"], int | float):
        raise UserError(f"rms_norm_eps is {config['rms_norm_eps']!r}, not a number")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise UserError(f"{name} is {config[name]!r}, not an object")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Theta and scaling, which older files keep at the top level and in ``rope_scaling``."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    base: dict[str, Any] = {"rotary_base": rope.get("rope_theta") or config.get("rope_theta", 10000.0)}
    if kind == "default":
        return base
    if kind == "linear":
        return base | {"rotary_seq_len_interpolation_factor": rope["factor"]}
    if kind == "llama3":
        changed = [name for name, value in _LLAMA3_SCALING.items() if rope.get(name, value) != value]
        if changed:
            raise UserError(
                f"rope scaling 'llama3' with {changed[0]} {rope[changed[0]]} is not supported, "
                f"{_LLAMA3_SCALING[changed[0]]} is"
            )
        return base | {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise UserError(f"rope scaling {kind!r} is not supported, 'default', 'linear' and 'llama3' are")


def weights(config: Mapping[str, Any]) -> Iterator[Weight]:
    """Every parameter of Megatron's local model, in order."""
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]

    def interleave(q_QD: torch.Tensor, k_KD: torch.Tensor, v_KD: torch.Tensor) -> torch.Tensor:
        """Of each query group: its queries' rows, then its key's, then its value's."""
        parts = [x.unflatten(0, (groups, -1)) for x in (q_QD, k_KD, v_KD)]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def stack(gate_FD: torch.Tensor, up_FD: torch.Tensor) -> torch.Tensor:
        return torch.cat((gate_FD, up_FD))

    yield Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
    for layer in range(config["num_hidden_layers"]):
        here, there = f"decoder.layers.{layer}", f"model.layers.{layer}"
        qkv = tuple(f"{there}.self_attn.{name}_proj.weight" for name in "qkv")
        gate_up = (f"{there}.mlp.gate_proj.weight", f"{there}.mlp.up_proj.weight")
        yield Weight(f"{here}.input_layernorm.weight", (f"{there}.input_layernorm.weight",))
        yield Weight(f"{here}.self_attention.linear_qkv.weight", qkv, interleave)
        yield Weight(f"{here}.self_attention.linear_proj.weight", (f"{there}.self_attn.o_proj.weight",))
        yield Weight(f"{here}.pre_mlp_layernorm.weight", (f"{there}.post_attention_layernorm.weight",))
        yield Weight(f"{here}.mlp.linear_fc1.weight", gate_up, stack)
        yield Weight(f"{here}.mlp.linear_fc2.weight", (f"{there}.mlp.down_proj.weight",))
    yield Weight("decoder.final_layernorm.weight", ("model.norm.weight",))
    if not config.get("tie_word_embeddings", False):
        yield Weight("output_layer.weight", ("lm_head.weight",))
