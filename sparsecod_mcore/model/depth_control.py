"""Explicit remedies for the growth of variance with depth, as options of the layer spec; see docs/depth_control.md.

Layers are counted from 1 here, as in the papers and in Megatron, over the whole model: l of L.
"""

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.model.norm import ScaledNorm
from sparsecod_mcore.model.residual_norms import BranchNormResidualAdd, PostNormResidualAdd
from sparsecod_mcore.model.unfused import ATTENTION_NORM, MLP_NORM, NORM_KEYS, with_separate_norms

KINDS = ("none", "layernorm_scaling", "scaled_init", "mix_ln", "deepnorm", "sandwich_norm")
DEFAULT_KIND = "scaled_init"  # what Megatron does unasked
DEFAULT_POST_NORM_SHARE = 0.25  # of Mix-LN's paper
_ADDS = {ATTENTION_NORM: "self_attn_bda", MLP_NORM: "mlp_bda"}


@dataclass(frozen=True)
class DepthControl:
    """One remedy, and its parameter."""

    kind: str = DEFAULT_KIND
    post_norm_share: float = DEFAULT_POST_NORM_SHARE  # of the layers, for mix_ln

    @classmethod
    def of(cls, args: Namespace) -> "DepthControl":
        """What a run's arguments ask for; checkpoints from before there was a choice have the default."""
        return cls(
            getattr(args, "cod_depth_control", DEFAULT_KIND),
            getattr(args, "cod_mix_ln_share", DEFAULT_POST_NORM_SHARE),
        )

    def check(self, transformer: TransformerConfig, *, training: bool) -> None:
        """Raise `UserError` for a model that the remedy cannot be had with."""
        if self.kind not in ("none", DEFAULT_KIND) and transformer.transformer_impl == "inference_optimized":
            raise UserError(f"depth_control {self.kind} cannot be had with transformer_impl inference_optimized")
        if self.kind not in ("none", DEFAULT_KIND) and transformer.fused_residual_rmsnorm:
            raise UserError(f"depth_control {self.kind} cannot be had with fused_residual_rmsnorm")
        if self.kind == "mix_ln" and self.post_norm_layers(transformer.num_layers) == 0:
            raise UserError(
                f"mix_ln_share {self.post_norm_share} of {transformer.num_layers} layers is not one layer; "
                f"{1 / transformer.num_layers:.3g} or more is accepted"
            )
        if self.kind == "deepnorm" and training:
            unsupported = ("multi_latent_attention", "fp8_param", "fp4_param", "init_model_with_meta_device")
            for name in unsupported:
                if getattr(transformer, name, None):
                    raise UserError(f"depth_control deepnorm scales initial weights, which {name} does not allow")

    def post_norm_layers(self, num_layers: int) -> int:
        """How many layers, from the first on, normalise the stream itself."""
        if self.kind == "deepnorm":
            return num_layers
        return math.floor(self.post_norm_share * num_layers) if self.kind == "mix_ln" else 0

    def set_initialisation(self, transformer: TransformerConfig) -> None:
        """Initialise the projections that write to the stream like all others, unless 1/√(2L) is the remedy."""
        if self.kind != DEFAULT_KIND:
            transformer.output_layer_init_method = transformer.init_method

    def apply(self, spec: TransformerBlockSubmodules, transformer: TransformerConfig, layers_before: int) -> None:
        """Change the layers of `spec`, the first of which is layer `layers_before` + 1 of the model."""
        change = {
            "layernorm_scaling": _scale_norms,
            "sandwich_norm": _norm_branches,
            "mix_ln": self._norm_stream,
            "deepnorm": self._norm_stream,
        }.get(self.kind)
        if change is None:
            return
        spec.layer_specs = [
            _changed(layer, partial(change, transformer=transformer, number=number))
            for number, layer in enumerate(spec.layer_specs or [], start=layers_before + 1)
        ]
        if self.kind == "deepnorm":  # the last layer has normalised its output
            spec.layer_norm = IdentityOp

    def _norm_stream(
        self, submodules: TransformerLayerSubmodules, transformer: TransformerConfig, number: int
    ) -> TransformerLayerSubmodules:
        """x := norm(alpha x + f(x)), in place of x + f(norm(x)), in the first layers.

        In a checkpoint the norm keeps the name that it has before the branch: layers stay alike, and a model's weights
        can be loaded into the same model with another remedy.
        """
        if number > self.post_norm_layers(transformer.num_layers):
            return submodules
        alpha = deepnorm_alpha(transformer.num_layers) if self.kind == "deepnorm" else 1.0
        submodules = with_separate_norms(submodules)
        builders = {norm: getattr(submodules, norm) for norm in NORM_KEYS}
        adds = {
            _ADDS[norm]: ModuleSpec(PostNormResidualAdd, {"config": transformer, "build": build, "alpha": alpha})
            for norm, build in builders.items()
        }
        submodules = replace(submodules, **adds, **dict.fromkeys(builders, IdentityOp))
        return _renamed(submodules, {f"{norm}.": f"{_ADDS[norm]}.norm." for norm in builders})


def deepnorm_alpha(num_layers: int) -> float:
    """Weight of the shortcut, (2L)^(1/4), of DeepNet's decoders."""
    return (2 * num_layers) ** 0.25


def deepnorm_beta(num_layers: int) -> float:
    """Scale of the initial weights of values, output projections and MLPs, (8L)^(-1/4), of DeepNet's decoders."""
    return (8 * num_layers) ** -0.25


def _scale_norms(
    submodules: TransformerLayerSubmodules, transformer: TransformerConfig, number: int
) -> TransformerLayerSubmodules:
    """norm(x) := norm(x) / √l, before both branches. Its weight keeps its name in checkpoints."""
    submodules = with_separate_norms(submodules)
    builders: dict[str, LayerNormBuilder] = {norm: getattr(submodules, norm) for norm in NORM_KEYS}
    scaled = {name: partial(ScaledNorm, build, number**-0.5) for name, build in builders.items()}
    return _renamed(replace(submodules, **scaled), {f"{norm}.": f"{norm}.norm." for norm in builders})


def _norm_branches(
    submodules: TransformerLayerSubmodules, transformer: TransformerConfig, number: int
) -> TransformerLayerSubmodules:
    """x := x + norm(f(norm(x)))."""
    build = with_separate_norms(submodules).input_layernorm
    add = ModuleSpec(BranchNormResidualAdd, {"config": transformer, "build": build})
    return replace(submodules, self_attn_bda=add, mlp_bda=add)


def _changed(
    layer: ModuleSpec, change: Callable[[TransformerLayerSubmodules], TransformerLayerSubmodules]
) -> ModuleSpec:
    return replace(layer, submodules=change(layer.submodules))


def _renamed(submodules: TransformerLayerSubmodules, moved: Mapping[str, str]) -> TransformerLayerSubmodules:
    """Keep the checkpoint's names of norms that `moved` from one place of the layer to another."""
    names = submodules.sharded_state_dict_keys_map
    kept = {place: name for place, name in names.items() if place not in moved}
    return replace(
        submodules, sharded_state_dict_keys_map=kept | {to: names.get(place, place) for place, to in moved.items()}
    )


def kind_of(text: str) -> str:
    """A kind as an argument, for argparse."""
    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r} is no remedy{nearest(text, KINDS)}; {', '.join(KINDS)} are")
    return text


def share_of(text: str) -> float:
    """A share of layers as an argument, for argparse."""
    share = float(text)
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is given, more than 0 and at most 1 is accepted")
    return share
