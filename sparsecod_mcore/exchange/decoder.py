"""What the families of Hugging Face have in common, in Megatron's flags and in ``config.json``, both ways.

All are pre-norm decoders with RMSNorm, rotary embeddings and SwiGLU; what they differ in stands in families.py.
"""

from collections.abc import Mapping
from typing import Any

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.exchange.rope import rope_config, rope_settings
from sparsecod_mcore.exchange.weights import is_mixture

type Config = dict[str, Any]  # a config.json
type Settings = dict[str, Any]  # Megatron's arguments, by destination

# What no family can do without, or do with; a family's own settings override some.
PLAIN: Settings = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "swiglu": True,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "cod_full_width_qk_norm": False,
    "cod_depth_control": "none",
    "multi_latent_attention": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "softmax_type": "vanilla",
    "window_size": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
    "use_mup": False,
    "mtp_num_layers": None,
    "num_experts": None,
}
PLAIN_MIXTURE: Settings = {
    "moe_layer_freq": 1,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "aux_loss",  # or any other but sinkhorn, which routes differently
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    "moe_router_force_biased": None,
    "moe_router_force_load_balancing": False,
    "moe_expert_rank_capacity_factor": None,
}
_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
_MAY_BE_LEFT_OUT = ("num_key_value_heads", "head_dim")
_MIXTURE_SIZES = ("num_experts", "moe_ffn_hidden_size", "moe_router_topk")


def decoder_settings(config: Config, *, theta: float = 10000.0, windowed: bool = True) -> Settings:
    """Megatron's arguments, by destination, of a model without experts.

    `theta` is the family's own, where the file gives none; `windowed` is whether a ``sliding_window`` is used.
    Raises `UserError` for what has no counterpart, `KeyError` for what is missing.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {config['hidden_act']!r} is not supported for this family, 'silu' is")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UserError(f"{name}: true is not supported, weights without biases are")
    sizes = {setting: whole_number(config, name, optional=name in _MAY_BE_LEFT_OUT) for setting, name in _SIZES.items()}
    heads = sizes["num_attention_heads"]
    sizes["num_query_groups"] = sizes["num_query_groups"] or heads
    sizes["kv_channels"] = sizes["kv_channels"] or sizes["hidden_size"] // heads
    if heads % sizes["num_query_groups"]:
        raise UserError(
            f"num_attention_heads {heads} is not divisible by num_key_value_heads {sizes['num_query_groups']}"
        )
    window = whole_number(config, "sliding_window", optional=True, least=0) if windowed else None
    if window:  # within the window attention is plain
        sizes["max_position_embeddings"] = min(sizes["max_position_embeddings"], window)
    epsilon = config["rms_norm_eps"]
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool):
        raise UserError(f"rms_norm_eps is {epsilon!r}, not a number")
    return {
        **PLAIN,
        **sizes,
        "group_query_attention": True,
        "layernorm_epsilon": epsilon,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "padded_vocab_size": sizes["vocab_size"],
        **rope_settings(config, theta),
    }


def mixture_settings(config: Config, experts: str, width: str, *, normalised: bool | None = None) -> Settings:
    """Those of the experts; `experts` and `width` are what the family calls their number and their width.

    `normalised` is whether the chosen experts' weights add up to one; None where the file says it.
    """
    num_experts, chosen = whole_number(config, experts), whole_number(config, "num_experts_per_tok")
    if chosen > num_experts:
        raise UserError(f"num_experts_per_tok {chosen} is more than the {num_experts} of {experts}")
    if normalised is None:
        normalised = bool(config.get("norm_topk_prob", False))
    if normalised and chosen == 1:  # a weight that is always 1, which Megatron's router does not do
        raise UserError("num_experts_per_tok 1 is not supported where the weights of chosen experts add up to one")
    return {
        **PLAIN_MIXTURE,
        "num_experts": num_experts,
        "moe_ffn_hidden_size": whole_number(config, width),
        "moe_router_topk": chosen,
        # Softmax over all experts, or over the chosen, which is the same as over all and divided by their sum.
        "moe_router_pre_softmax": not normalised,
        "moe_token_dispatcher_type": "alltoall",
    }


def whole_number(config: Config, name: str, *, optional: bool = False, least: int = 1) -> Any:
    """``config[name]``. Raises `UserError` if it is no number, `KeyError` if it is missing and not `optional`."""
    value = config.get(name) if optional else config[name]
    if value is None and optional:
        return None
    if type(value) is not int or value < least:
        raise UserError(f"{name} is {value!r}, not a whole number of {least} or more")
    return value


def decoder_config(settings: Mapping[str, Any]) -> Config:
    """The entries of ``config.json`` that all families have, for `normalised` settings."""
    return {
        **{name: settings[setting] for setting, name in _SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": settings["layernorm_epsilon"],
        "tie_word_embeddings": not settings["untie_embeddings_and_output_weights"],
        "attention_dropout": 0.0,
        "use_cache": True,
        **rope_config(settings),
    }


def normalised(settings: Mapping[str, Any]) -> Settings:
    """What of complete `settings` defines the model, so that equal models have equal settings.

    Raises `UserError` where a size is not known.
    """
    sizes = {name: settings[name] for name in (*_SIZES, "layernorm_epsilon", "untie_embeddings_and_output_weights")}
    sizes["vocab_size"] = settings["vocab_size"] or settings["padded_vocab_size"]
    heads = sizes["num_attention_heads"]
    if not settings["group_query_attention"]:
        sizes["num_query_groups"] = heads
    found = PLAIN | {name: settings[name] for name in PLAIN} | sizes
    if found["cod_depth_control"] == "scaled_init":  # which only says what weights were at first
        found["cod_depth_control"] = PLAIN["cod_depth_control"]
    if settings["num_experts"]:
        found |= {name: settings[name] for name in (*PLAIN_MIXTURE, *_MIXTURE_SIZES)}
        found["moe_ffn_hidden_size"] = settings["moe_ffn_hidden_size"] or settings["ffn_hidden_size"]
        if found["moe_router_load_balancing_type"] not in ("sinkhorn", ["sinkhorn"]):
            found["moe_router_load_balancing_type"] = PLAIN_MIXTURE["moe_router_load_balancing_type"]
        if not found["moe_shared_expert_intermediate_size"]:
            found |= {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}
        mixtures = [is_mixture(settings, layer) for layer in range(settings["num_layers"])]
        found["moe_layer_freq"] = 1 if all(mixtures) else [int(mixture) for mixture in mixtures]
        if all(mixtures):  # no layer has an MLP of this width
            found["ffn_hidden_size"] = found["moe_ffn_hidden_size"]
    missing = [name for name in sizes if found[name] is None and name != "kv_channels"]
    if missing:
        raise UserError(f"the arguments do not say what {missing[0]} is")
    found["kv_channels"] = found["kv_channels"] or found["hidden_size"] // heads
    rope = {name: settings[name] for name in ("rotary_base", "use_rope_scaling", "rotary_seq_len_interpolation_factor")}
    return found | rope | {"rope_scaling_factor": settings["rope_scaling_factor"] if rope["use_rope_scaling"] else None}
