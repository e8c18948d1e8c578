"""The families of Hugging Face models that are read and written: what each adds to the decoder they share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.exchange.decoder import (
    Config,
    Settings,
    decoder_config,
    decoder_settings,
    mixture_settings,
    normalised,
    whole_number,
)
from sparsecod_mcore.exchange.weights import MixtureNames, Weight, decoder_weights, is_mixture


@dataclass(frozen=True)
class Family:
    """What a ``config.json`` of this family means in Megatron's flags, and what it looks like for given ones.

    `config` is given `normalised` settings that may be of another family: the model that it describes then differs
    from the given one, and `find_family` tells.
    """

    model_types: tuple[str, ...]  # the first is written
    architecture: str
    settings: Callable[[Config], Settings]
    config: Callable[[Settings], Config]
    mixture: bool = False
    names: MixtureNames = field(default_factory=MixtureNames)

    def weights(self, settings: Mapping[str, Any]) -> Iterator[Weight]:
        """Every weight of the model that `settings` describe."""
        return decoder_weights(settings, self.names)


def _mistral(config: Config) -> Settings:
    return decoder_settings({"sliding_window": 4096} | config)  # unless it says null


def _mistral_config(settings: Settings) -> Config:
    return decoder_config(settings) | {"sliding_window": None}


def _qwen(config: Config) -> Settings:
    return decoder_settings(config, windowed=bool(config.get("use_sliding_window", False)))


def _qwen3(config: Config) -> Settings:
    return _qwen({"head_dim": 128} | config) | {"qk_layernorm": True}


def _mixtral(config: Config) -> Settings:
    mixture = mixture_settings(config, "num_local_experts", "intermediate_size", normalised=True)
    return decoder_settings(config, theta=1e6) | mixture


def _mixtral_config(settings: Settings) -> Config:
    return decoder_config(settings) | {
        "intermediate_size": settings["moe_ffn_hidden_size"],
        "num_local_experts": settings["num_experts"],
        "num_experts_per_tok": settings["moe_router_topk"],
        "sliding_window": None,
    }


def _olmoe(config: Config) -> Settings:
    if config.get("clip_qkv") is not None:
        raise UserError(f"clip_qkv {config['clip_qkv']} is not supported, null is")
    width = whole_number(config, "hidden_size") // whole_number(config, "num_attention_heads")
    if config.get("head_dim") not in (None, width):
        raise UserError(f"head_dim {config['head_dim']} is not supported for this family, whose norms do without it")
    mixture = mixture_settings(config, "num_experts", "intermediate_size")
    return decoder_settings(config) | mixture | {"qk_layernorm": True, "cod_full_width_qk_norm": True}


def _olmoe_config(settings: Settings) -> Config:
    config = decoder_config(settings) | {
        "intermediate_size": settings["moe_ffn_hidden_size"],
        "num_experts": settings["num_experts"],
        "num_experts_per_tok": settings["moe_router_topk"],
        "norm_topk_prob": not settings["moe_router_pre_softmax"],
        "clip_qkv": None,
    }
    del config["head_dim"]
    return config


def _qwen2_moe(config: Config) -> Settings:
    step = whole_number({"decoder_sparse_step": 1} | config, "decoder_sparse_step")
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise UserError(f"mlp_only_layers is {dense!r}, not a list of layers")
    layers = range(whole_number(config, "num_hidden_layers"))
    mixtures = [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]
    if not any(mixtures):
        raise UserError("no layer has experts; such a model is a qwen2")
    return (
        _qwen(config)
        | mixture_settings(config, "num_experts", "moe_intermediate_size")
        | {
            "add_qkv_bias": bool(config.get("qkv_bias", True)),
            "moe_shared_expert_intermediate_size": whole_number(config, "shared_expert_intermediate_size"),
            "moe_shared_expert_gate": True,
            "moe_layer_freq": 1 if all(mixtures) else mixtures,
        }
    )


def _qwen2_moe_config(settings: Settings) -> Config:
    return decoder_config(settings) | {
        "num_experts": settings["num_experts"],
        "num_experts_per_tok": settings["moe_router_topk"],
        "norm_topk_prob": not settings["moe_router_pre_softmax"],
        "moe_intermediate_size": settings["moe_ffn_hidden_size"],
        "shared_expert_intermediate_size": settings["moe_shared_expert_intermediate_size"],
        "qkv_bias": settings["add_qkv_bias"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(settings["num_layers"]) if not is_mixture(settings, layer)],
        "use_sliding_window": False,
    }


def _without_window(settings: Settings) -> Config:
    return decoder_config(settings) | {"use_sliding_window": False}


FAMILIES = (
    Family(("llama",), "LlamaForCausalLM", decoder_settings, decoder_config),
    Family(("mistral",), "MistralForCausalLM", _mistral, _mistral_config),
    Family(("qwen2",), "Qwen2ForCausalLM", lambda config: _qwen(config) | {"add_qkv_bias": True}, _without_window),
    Family(("qwen3",), "Qwen3ForCausalLM", _qwen3, _without_window),
    Family(
        ("mixtral",),
        "MixtralForCausalLM",
        _mixtral,
        _mixtral_config,
        mixture=True,
        names=MixtureNames("block_sparse_moe.gate", "block_sparse_moe.experts.{}", "w1", "w3", "w2"),
    ),
    Family(("olmoe",), "OlmoeForCausalLM", _olmoe, _olmoe_config, mixture=True),
    Family(("qwen2_moe",), "Qwen2MoeForCausalLM", _qwen2_moe, _qwen2_moe_config, mixture=True),
)
BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def find_family(settings: Mapping[str, Any]) -> tuple[Family, Config]:
    """The family that computes exactly what a model of these complete `settings` computes, and its ``config.json``.

    Raises `UserError`, naming a flag that is in the way, if there is none.
    """
    wanted = normalised(settings)
    if wanted.get("moe_shared_expert_intermediate_size"):
        wanted["moe_shared_expert_gate"] = True  # `decoder_weights` gives it one
    misses: list[tuple[int, str]] = []
    for family in FAMILIES:
        if family.mixture != bool(wanted["num_experts"]):
            continue
        config = family.config(wanted)
        try:
            given = normalised(family.settings(config))
        except UserError as error:  # a size that this family cannot do without
            misses.append((len(wanted), f"{family.model_types[0]}: {error}"))
            continue
        differing = [name for name, value in given.items() if wanted[name] != value]
        if not differing:
            identity = {"architectures": [family.architecture], "model_type": family.model_types[0]}
            return family, identity | config
        name = differing[0]
        closest = f"{name} is {wanted[name]!r}, which the closest, {family.model_types[0]}, has {given[name]!r} for"
        misses.append((len(differing), closest))
    raise UserError(f"no supported family computes what this model does: {min(misses)[1]}")
