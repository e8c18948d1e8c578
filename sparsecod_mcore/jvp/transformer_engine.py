"""Forward-mode rules of Transformer Engine's modules, for where it is installed.

Tangents go through weights in the dtype that they are trained in: weights kept in FP8 are taken out of it, and no
scaling state of FP8 is read or changed. Transformer Engine runs the collectives of its own modules; these rules run
the same.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_mcore.jvp.attention import Heads, causal_attention, core_attention
from sparsecod_mcore.jvp.dual import Dual, all_reduce, gather_sequence, project, reduce_scatter_sequence
from sparsecod_mcore.jvp.moe import experts, scale
from sparsecod_mcore.jvp.rules import jvp, layer_norm, rms_norm, swiglu, unsupported
from sparsecod_mcore.jvp.shared import norm_before


def norm(module: Any, x: Dual) -> Dual:
    """te.pytorch.RMSNorm and te.pytorch.LayerNorm."""
    return _norm(x, module.weight, getattr(module, "bias", None), module)


def _norm(x: Dual, weight_D: Tensor, bias_D: Tensor | None, module: Any) -> Dual:
    weight_D = weight_D + 1 if module.zero_centered_gamma else weight_D
    if bias_D is None or bias_D.numel() == 0:
        return rms_norm(x, weight_D, module.eps)
    return layer_norm(x, weight_D, bias_D, module.eps)


def linear(module: Any, x: Dual) -> Dual:
    """te.pytorch.Linear, column-parallel, row-parallel, or neither."""
    group, parallel = module._tp_group, module.sequence_parallel
    if module.parallel_mode == "column" and parallel:
        x = gather_sequence(x, group)
    y = project(x, module.weight)
    if module.parallel_mode == "row":
        y = (reduce_scatter_sequence if parallel else all_reduce)(y, group)
    return _with_bias(y, module.bias)


def layer_norm_linear(module: Any, x: Dual) -> Dual:
    """te.pytorch.LayerNormLinear: a norm fused with the column-parallel projection behind it."""
    bias_D = module.layer_norm_bias if module.normalization == "LayerNorm" else None
    normed = _norm(x, module.layer_norm_weight, bias_D, module)
    if module.sequence_parallel:
        normed = gather_sequence(normed, module._tp_group)
    return _with_bias(project(normed, module.weight), module.bias)


def norm_in(projection: Any, norm: torch.nn.Module) -> tuple[Tensor, float] | None:
    """The RMSNorm inside of te.pytorch.LayerNormLinear; None for a LayerNorm."""
    if projection.normalization != "RMSNorm":
        return None
    return projection.layer_norm_weight + int(projection.zero_centered_gamma), projection.eps


def _with_bias(y: Dual, bias: Tensor | None) -> Dual:
    return y if bias is None or bias.numel() == 0 else Dual(y.value + bias, y.tangents)


def dot_product_attention(module: Any, of: Heads, context_parallel: dist.ProcessGroup) -> Dual:
    """te.pytorch.DotProductAttention, with neither window nor sink."""
    if getattr(module, "window_size", None) not in (None, (-1, 0), (-1, -1)):
        raise unsupported(module, f"the window {module.window_size}")
    if getattr(module, "softmax_type", "vanilla") != "vanilla":
        raise unsupported(module, f"the softmax {module.softmax_type}")
    return causal_attention(of, module.softmax_scale, context_parallel)


def grouped_mlp(module: Any, tokens: Dual, counts: list[int], gate: Dual) -> Dual:
    """TEGroupedMLP: experts whose projections are te.pytorch.GroupedLinear."""
    activated = swiglu(module, grouped_linear(module.linear_fc1, tokens, counts))
    return grouped_linear(module.linear_fc2, scale(activated, gate), counts)


def grouped_linear(module: Any, x: Dual, counts: list[int]) -> Dual:
    """One projection for the rows [T, D] of each expert, sorted by expert, `counts` for each."""
    values, tangents = x.value.split(counts), x.tangents.split(counts, 1)
    weights = (getattr(module, f"weight{expert}") for expert in range(len(counts)))
    parts = [project(Dual(*pair), weight) for *pair, weight in zip(values, tangents, weights, strict=True)]
    return Dual(torch.cat([part.value for part in parts]), torch.cat([part.tangents for part in parts], 1))


def register() -> None:
    """Register the rules for the classes that Transformer Engine and Megatron's wrappers of it define."""
    import transformer_engine.pytorch as te
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    for kind in (te.RMSNorm, te.LayerNorm):
        jvp.register(kind, norm)
    jvp.register(te.Linear, linear)
    jvp.register(te.LayerNormLinear, layer_norm_linear)
    norm_before.register(te.LayerNormLinear, norm_in)
    core_attention.register(te.DotProductAttention, dot_product_attention)
    experts.register(TEGroupedMLP, grouped_mlp)
