"""Forward-mode rules of attention: projections, rotary embedding, core attention."""

from functools import singledispatch

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from sparsecod_mcore.jvp.dual import Dual, gather_sequence
from sparsecod_mcore.jvp.rules import jvp, unknown, unsupported
from sparsecod_mcore.model.attention import SDPACoreAttention, zigzag_positions
from sparsecod_mcore.ops import flash_attention_jvp

type Rotary = Tensor | tuple[Tensor, Tensor] | None


def self_attention(module: SelfAttention, x: Dual, rotary_pos_emb: Rotary) -> Dual:
    """What self-attention makes of its normed input x [S, B, D]; `rotary_pos_emb` is what Megatron gives the layer."""
    if type(module) is not SelfAttention:
        raise unknown(module)
    config = module.config
    if config.attention_output_gate:
        raise unsupported(module, "attention_output_gate")
    if module.attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        raise unsupported(module, f"the mask {module.attn_mask_type.name}")
    q, k, v = _split_heads(module, jvp(module.linear_qkv, x))
    if module.q_layernorm is not None:
        q = jvp(module.q_layernorm, q)
    if module.k_layernorm is not None:
        k = jvp(module.k_layernorm, k)
    without_rotary = config.no_rope_freq and config.no_rope_freq[module.layer_number - 1]
    if rotary_pos_emb is not None and not without_rotary:
        of_q, of_k = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
        q, k = _rotate(module, q, of_q), _rotate(module, k, of_k)
    return jvp(module.linear_proj, core_attention(module.core_attention, q, k, v, module.pg_collection.cp))


def _split_heads(module: SelfAttention, mixed: Dual) -> tuple[Dual, Dual, Dual]:
    """Queries [S, B, N, H], keys and values [S, B, G, H] of this rank.

    A query group's queries, key and value lie side by side. Where there are fewer groups than tensor-parallel ranks, a
    group is spread over ranks: it is gathered, and each rank takes its share of the group's queries.
    """
    heads, groups = module.num_attention_heads_per_partition, module.num_query_groups_per_partition
    width, group = module.hidden_size_per_attention_head, module.pg_collection.tp
    num_query_groups = module.config.num_query_groups
    ranks_per_group = max(1, module.world_size // num_query_groups)
    own_group, share = divmod(group.rank(), ranks_per_group)
    heads_per_group = heads * ranks_per_group // groups

    def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if ranks_per_group > 1:
            x = all_gather_last_dim_from_tensor_parallel_region(x.contiguous(), group=group)
            x = x.chunk(num_query_groups, -1)[own_group]
        grouped = x.unflatten(-1, (groups, heads_per_group + 2, width))
        q, k, v = grouped.split([heads_per_group, 1, 1], -2)
        q = q.flatten(-3, -2)
        if ranks_per_group > 1:
            q = q[..., share * heads : (share + 1) * heads, :]
        return q, k.squeeze(-2), v.squeeze(-2)

    q, k, v = (Dual(*pair) for pair in zip(split(mixed.value), split(mixed.tangents), strict=True))
    return q, k, v


def _rotate(module: SelfAttention, x: Dual, angles_S11H: Tensor) -> Dual:
    """A rotation by position: linear, and the same for all tangents (whose axis stands before S)."""
    interleaved, scale = module.config.rotary_interleaved, module._yarn_concentration_factor
    return x.map(lambda t: _apply_rotary_pos_emb_bshd(t, angles_S11H, rotary_interleaved=interleaved, mscale=scale))


@singledispatch
def core_attention(module: torch.nn.Module, q: Dual, k: Dual, v: Dual, context_parallel: dist.ProcessGroup) -> Dual:
    """Context [S, B, N * H] of queries [S, B, N, H], keys and values [S, B, G, H]."""
    raise unknown(module)


@core_attention.register
def _(module: SDPACoreAttention, q: Dual, k: Dual, v: Dual, context_parallel: dist.ProcessGroup) -> Dual:
    return causal_attention(q, k, v, module.softmax_scale, context_parallel)


def causal_attention(q: Dual, k: Dual, v: Dual, scale: float | None, context_parallel: dist.ProcessGroup) -> Dual:
    """Causal attention; under context parallelism keys and values of all ranks are gathered.

    A rank then holds two chunks of queries, zigzag, each of which sees the keys up to its own end.
    """
    ranks = context_parallel.size()
    if ranks == 1:
        return _attend(q, k, v, scale)
    length = q.value.shape[0] * ranks
    order_S = torch.cat([zigzag_positions(length, ranks, rank) for rank in range(ranks)]).argsort()
    order_S = order_S.to(q.value.device)
    k, v = (
        Dual(x.value[order_S], x.tangents[:, order_S]) for x in (gather_sequence(y, context_parallel) for y in (k, v))
    )
    contexts = []
    chunk = length // (2 * ranks)
    for part, number in enumerate((context_parallel.rank(), 2 * ranks - 1 - context_parallel.rank())):
        queries, keys = slice(part * chunk, (part + 1) * chunk), slice(0, (number + 1) * chunk)
        contexts.append(_attend(_positions(q, queries), _positions(k, keys), _positions(v, keys), scale))
    values, tangents = zip(*contexts, strict=True)
    return Dual(torch.cat(values), torch.cat(tangents, 1))


def _positions(x: Dual, positions: slice) -> Dual:
    return Dual(x.value[positions], x.tangents[:, positions])


def _attend(q: Dual, k: Dual, v: Dual, scale: float | None) -> Dual:
    q_BNSH, k_BGTH, v_BGTH = (x.value.permute(1, 2, 0, 3) for x in (q, k, v))
    q_PBNSH, k_PBGTH, v_PBGTH = (x.tangents.permute(0, 2, 3, 1, 4) for x in (q, k, v))
    context_BNSH, tangents_PBNSH, _ = flash_attention_jvp(q_BNSH, k_BGTH, v_BGTH, q_PBNSH, k_PBGTH, v_PBGTH, scale)
    return Dual(context_BNSH.permute(2, 0, 1, 3).flatten(2), tangents_PBNSH.permute(0, 3, 1, 2, 4).flatten(3))
