"""The derivative of one transformer layer."""

from typing import NamedTuple

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from torch import Tensor

from sparsecod_mcore import platform
from sparsecod_mcore.jvp import moe, transformer_engine  # noqa: F401  rules are registered by their import
from sparsecod_mcore.jvp.adds import added, added_with_sums
from sparsecod_mcore.jvp.attention import Heads, Rotary, attend, heads
from sparsecod_mcore.jvp.dual import Dual
from sparsecod_mcore.jvp.rules import jvp, unknown, unsupported
from sparsecod_mcore.jvp.shared import shared_tangents
from sparsecod_mcore.ops import NUM_PROBE_MOMENTS, probe_moments

if platform.has_transformer_engine():
    transformer_engine.register()


class Branches(NamedTuple):
    """What the two branches of a layer add to the residual stream, each [S, B, D] with tangents [P, S, B, D].

    For the layer's Jacobian J, the tangents v of its input and u_attention, u_mlp of the branches:
    (J - I) v = u_attention + u_mlp.
    """

    attention: Dual
    mlp: Dual


class ProbedBranches(NamedTuple):
    """Tangents of both branches: summed over tokens [P, D] where the direction is the same at all, or [Q, S, B, D]."""

    attention_sums: Tensor
    mlp_sums: Tensor
    attention: Tensor
    mlp: Tensor


@torch.no_grad()
def layer_branches(layer: TransformerLayer, stream: Dual, rotary_pos_emb: Rotary = None) -> Branches:
    """What the layer adds to the residual stream [S, B, D], with tangents along those of the stream.

    Under sequence and context parallelism S is this rank's part. Collective over the ranks that share the layer.
    Raises UserError for modules without a rule.
    """
    _check(layer)
    dtype = stream.value.dtype
    attention = attend(layer.self_attention, _heads(layer, stream, rotary_pos_emb)).to(dtype)
    attention = added(layer.self_attn_bda, attention, stream)
    after = stream + attention
    mlp = jvp(layer.mlp, jvp(layer.pre_mlp_layernorm, after)).to(dtype)
    return Branches(attention, added(layer.mlp_bda, mlp, after))


@torch.no_grad()
def probe_branches(
    layer: TransformerLayer,
    hidden_SBD: Tensor,
    shared_PD: Tensor,
    own_QSBD: Tensor | None = None,
    rotary_pos_emb: Rotary = None,
) -> ProbedBranches:
    """`layer_branches` along directions that are the same at all tokens, and along others that need not be.

    The former are summed over the tokens of this rank as early as may be: nothing else of them enters a Jacobian that
    is averaged over tokens.
    """
    _check(layer)
    directions_PSBD = shared_PD[:, None, None].expand(-1, *hidden_SBD.shape)
    own_QSBD = directions_PSBD[:0] if own_QSBD is None else own_QSBD
    of = _heads(layer, Dual(hidden_SBD, own_QSBD), rotary_pos_emb)
    of = of._replace(shared=shared_tangents(layer, hidden_SBD, shared_PD, of))
    if of.shared is None:
        q, k, v, *_ = _heads(layer, Dual(hidden_SBD, directions_PSBD), rotary_pos_emb)
        of = of.along(q.tangents, k.tangents, v.tangents)
    stream = Dual(hidden_SBD, torch.cat([directions_PSBD, own_QSBD]))
    attention = added(layer.self_attn_bda, attend(layer.self_attention, of).to(hidden_SBD.dtype), stream)
    after = Dual(hidden_SBD + attention.value, stream.tangents.add_(attention.tangents))
    normed = jvp(layer.pre_mlp_layernorm, after)
    mlp_sums, mlp = added_with_sums(layer.mlp_bda, layer.mlp, normed, after, len(shared_PD))
    of_shared, of_own = attention.tangents.tensor_split([len(shared_PD)])
    return ProbedBranches(_token_sums(shared_PD, of_shared), mlp_sums, of_own, mlp.to(hidden_SBD.dtype))


def _token_sums(v_PD: Tensor, u_PSBD: Tensor) -> Tensor:
    """Sum over tokens, [P, D] in float64."""
    sums_PD = torch.zeros(v_PD.shape, dtype=torch.float64, device=v_PD.device)
    probe_moments(v_PD, u_PSBD.flatten(1, 2), sums_PD, sums_PD.new_zeros(len(v_PD), NUM_PROBE_MOMENTS))
    return sums_PD


def _heads(layer: TransformerLayer, stream: Dual, rotary_pos_emb: Rotary) -> Heads:
    return heads(layer.self_attention, jvp(layer.input_layernorm, stream), rotary_pos_emb)


def layer_jvp(
    layer: TransformerLayer, hidden_states: Tensor, tangents: Tensor, rotary_pos_emb: Rotary = None
) -> tuple[Tensor, Tensor]:
    """Output of `layer` for `hidden_states` [S, B, D], and its tangents along `tangents` [P, S, B, D].

    As `layer_branches`, with the residual stream added.
    """
    stream = Dual(hidden_states, tangents)
    branches = layer_branches(layer, stream, rotary_pos_emb)
    output = stream + branches.attention + branches.mlp
    return output.value, output.tangents


def rehearse(layer: TransformerLayer) -> None:
    """Run the rules on two tokens, to find out before training whether each module has one. Collective, as they are."""
    weight = next(layer.parameters())
    hidden_SBD = torch.zeros(2, 1, layer.config.hidden_size, dtype=weight.dtype, device=weight.device)
    layer_branches(layer, Dual(hidden_SBD, hidden_SBD[None]))


def _check(layer: TransformerLayer) -> None:
    """Refuse a layer that is more than attention and an MLP, each behind a norm."""
    if type(layer) not in (TransformerLayer, MoETransformerLayer):
        raise unknown(layer)
    if not isinstance(layer.cross_attention, IdentityOp):
        raise unsupported(layer, "cross-attention")
