"""Directions that are the same at every token stay simple for a while: through the first norm and projection.

RMSNorm n = r w x, r = (mean(x^2) + eps)^(-1/2), has along v the tangent r w v - c n with c = r^2 mean(x v). So after a
projection y = W n and a rotation R by position, y' = r R W (w v) - c R y: one projection for each direction, not one
for each token and direction. Attention takes its tangents in that form.
"""

from functools import singledispatch

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from sparsecod_mcore.jvp.attention import Heads, Rotation, split_heads
from sparsecod_mcore.jvp.dual import Dual, gather_sequence, plain
from sparsecod_mcore.model.norm import RMSNorm, ScaledNorm
from sparsecod_mcore.ops import SharedTangents


@singledispatch
def norm_before(projection: torch.nn.Module, norm: torch.nn.Module) -> tuple[Tensor, float] | None:
    """Weight and eps of the RMSNorm whose output `projection` takes; None where something else is before it."""
    return None


@norm_before.register
def _(projection: ColumnParallelLinear, norm: torch.nn.Module) -> tuple[Tensor, float] | None:
    if isinstance(norm, ScaledNorm):
        inner = norm_before(projection, norm.norm)
        return None if inner is None else (norm.scale * inner[0], inner[1])
    return (norm.weight, norm.eps) if isinstance(norm, RMSNorm) else None


def shared_tangents(layer: TransformerLayer, hidden_SBD: Tensor, shared_PD: Tensor, of: Heads) -> SharedTangents | None:
    """Tangents of the values in `of`, along directions shared by all tokens.

    None where the layer's norm or projection is of another kind.
    """
    attention = layer.self_attention
    projection = attention.linear_qkv
    norm = norm_before(projection, layer.input_layernorm)
    normed_heads = attention.q_layernorm is not None or attention.k_layernorm is not None
    if norm is None or normed_heads or (projection.bias is not None and projection.bias.numel()):
        return None
    weight_D, eps = norm
    x_SBD = hidden_SBD.to(torch.promote_types(hidden_SBD.dtype, torch.float32))
    r_SB = (x_SBD.square().mean(-1) + eps).rsqrt()
    c_PSB = r_SB.square() * (x_SBD @ shared_PD.to(x_SBD.dtype).T).movedim(-1, 0) / x_SBD.shape[-1]
    scales = Dual(r_SB, -c_PSB)
    if projection.sequence_parallel:
        scales = gather_sequence(scales, attention.pg_collection.tp)
    dtype = of.q.value.dtype
    projected_PE = (shared_PD * weight_D.to(shared_PD.dtype)).to(dtype) @ plain(projection.weight).T
    q_PNH, k_PGH, v_PGH = split_heads(attention, projected_PE)

    def at_all_positions(part_PNH: Tensor, rotation: Rotation | None) -> Tensor:
        part_PS1NH = part_PNH[:, None, None].expand(-1, len(of.q.value), -1, -1, -1)
        return (part_PS1NH if rotation is None else rotation(part_PS1NH)).squeeze(2).transpose(1, 2)

    offsets = at_all_positions(q_PNH, of.of_q), at_all_positions(k_PGH, of.of_k), v_PGH
    return SharedTangents(*offsets, *(x.mT.contiguous() for x in scales))
