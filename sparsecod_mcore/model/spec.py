"""Layer specs: Megatron's own choice for a configuration, with this project's residual adds, norm and attention."""

from argparse import Namespace
from functools import partial

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.model.attention import SDPACoreAttention
from sparsecod_mcore.model.deepnorm import scale_initial_weights
from sparsecod_mcore.model.depth_control import DepthControl
from sparsecod_mcore.model.norm import AllHeadsRMSNorm, RMSNorm
from sparsecod_mcore.model.residual import MeasuredResidualAdd


def use_measured_spec(model_config: GPTModelConfig, args: Namespace, *, training: bool) -> None:
    """Have `model_config` build with `measured_spec`, its norms of queries and keys and the depth control of `args`.

    Raises `UserError` where these do not go together.
    """
    control = DepthControl.of(args)
    control.check(model_config.transformer, training=training)
    control.set_initialisation(model_config.transformer)
    model_config.transformer_layer_spec = partial(
        measured_spec, control=control, full_width_qk_norm=args.cod_full_width_qk_norm
    )
    if training and control.kind == "deepnorm":
        model_config.pre_wrap_hooks.append(scale_initial_weights)


def measured_spec(
    model_config: GPTModelConfig,
    vp_stage: int | None = None,
    control: DepthControl | None = None,
    full_width_qk_norm: bool = False,
) -> TransformerBlockSubmodules:
    """The decoder's spec for one pipeline stage: local or Transformer Engine, dense or MoE.

    The adds are replaced everywhere. In the local spec so are the norms (upstream's refuse sequence parallelism) and
    the core attention (upstream's keeps S x S scores); Transformer Engine's fused modules are left as they are.
    With `full_width_qk_norm` queries, and keys, of all heads are normalised together.
    """
    transformer = model_config.transformer
    spec = default_layer_spec(model_config, vp_stage)
    local = transformer.transformer_impl == "local"
    if isinstance(spec, ModuleSpec):
        layers = [spec] * get_num_layers_to_build(transformer, vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=LayerNormImpl)
        if not local:
            from megatron.core.extensions.transformer_engine import TENorm

            spec.layer_norm = TENorm
    if local and transformer.normalization == "RMSNorm":
        spec.layer_norm = RMSNorm
    for layer in spec.layer_specs or []:
        _measure(layer.submodules)
        if local:
            _localise(layer.submodules, rms_norm=transformer.normalization == "RMSNorm")
        if full_width_qk_norm:
            if not transformer.qk_layernorm or transformer.normalization != "RMSNorm":
                raise UserError("cod.full_width_qk_norm needs qk_layernorm: true and normalization: RMSNorm")
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = partial(AllHeadsRMSNorm, heads=transformer.num_attention_heads)
            attention.k_layernorm = partial(AllHeadsRMSNorm, heads=transformer.num_query_groups)
    if control is not None:
        control.apply(spec, transformer, get_transformer_layer_offset(transformer, vp_stage))
    return spec


def _measure(submodules: TransformerLayerSubmodules) -> None:
    submodules.self_attn_bda = MeasuredResidualAdd
    submodules.mlp_bda = MeasuredResidualAdd


def _localise(submodules: TransformerLayerSubmodules, *, rms_norm: bool) -> None:
    attention = submodules.self_attention
    if issubclass(attention.module, SelfAttention):  # multi-latent attention keeps upstream's core
        attention.submodules.core_attention = SDPACoreAttention
    if rms_norm:
        submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
        for name in ("q_layernorm", "k_layernorm"):
            if getattr(attention.submodules, name, None) is WrappedTorchNorm:
                setattr(attention.submodules, name, RMSNorm)
