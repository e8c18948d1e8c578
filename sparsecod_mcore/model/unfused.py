"""A layer's two norms as modules of their own, where Transformer Engine fuses them with the projection behind."""

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from sparsecod_mcore.errors import UserError

ATTENTION_NORM, MLP_NORM = "input_layernorm", "pre_mlp_layernorm"
# What Megatron calls them in checkpoints, fused or not, of dense layers.
NORM_KEYS = {
    ATTENTION_NORM: "self_attention.linear_qkv.layer_norm_",
    MLP_NORM: "mlp.linear_fc1.layer_norm_",
}


def with_separate_norms(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """`submodules` with a norm before each branch, and projections without; those that have it so are left as they are.

    Scaling what a fused module puts out would scale its bias as well, and the norm cannot be taken from before it.
    Raises `UserError` for layers whose norms are fused in other ways.
    """
    if submodules.input_layernorm is IdentityOp:
        submodules = _with_attention_norm(submodules)
    if submodules.pre_mlp_layernorm is IdentityOp:
        submodules = _with_mlp_norm(submodules)
    return submodules


def _with_attention_norm(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    fused, plain, norm = _transformer_engine()
    attention = submodules.self_attention
    if getattr(attention.submodules, "linear_qkv", None) is not fused:
        raise UserError("this attention has its norm inside; depth_control needs it before (--transformer-impl local)")
    attention = replace(attention, submodules=replace(attention.submodules, linear_qkv=plain))
    return _with_norm(replace(submodules, self_attention=attention), ATTENTION_NORM, norm)


def _with_mlp_norm(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    fused, plain, norm = _transformer_engine()
    mlp: Any = submodules.mlp
    is_plain_mlp = isinstance(mlp, partial) and getattr(mlp.func, "__self__", None) is MLP
    if not is_plain_mlp or mlp.keywords["submodules"].linear_fc1 is not fused:
        raise UserError("this MLP has its norm inside; depth_control needs it before (--transformer-impl local)")
    mlp = partial(mlp, submodules=replace(mlp.keywords["submodules"], linear_fc1=plain))
    return _with_norm(replace(submodules, mlp=mlp), MLP_NORM, norm)


def _with_norm(submodules: TransformerLayerSubmodules, place: str, norm: Any) -> TransformerLayerSubmodules:
    names = submodules.sharded_state_dict_keys_map | {f"{place}.": NORM_KEYS[place]}
    return replace(submodules, **{place: norm}, sharded_state_dict_keys_map=names)


def _transformer_engine() -> tuple[Any, Any, Any]:
    """Its projection with a norm, the one without, and its norm."""
    from megatron.core.extensions import transformer_engine

    return (
        transformer_engine.TELayerNormColumnParallelLinear,
        transformer_engine.TEColumnParallelLinear,
        transformer_engine.TENorm,
    )
