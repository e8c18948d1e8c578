"""Forward-mode rules of attention: projections, rotary embedding, core attention."""

from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from sparsecod_mcore.jvp.dual import Dual, gather_sequence
from sparsecod_mcore.jvp.rules import jvp, unknown, unsupported
from sparsecod_mcore.model.attention import SDPACoreAttention, zigzag_positions
from sparsecod_mcore.ops import SharedTangents, flash_attention_jvp

type Rotary = Tensor | tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of heads [..., S, B, N, H]: linear, and the same for all tangents."""

    cosine_S11H: Tensor
    sine_S11H: Tensor
    first: slice  # of H, the dimensions that are turned with those of `second`
    second: slice

    def __call__(self, t: Tensor) -> Tensor:
        """Rotate t. Both halves are turned in place, in half the passes over memory that Megatron's function takes."""
        cosine, sine, first, second = self.cosine_S11H, self.sine_S11H, self.first, self.second
        turned = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        torch.mul(t[..., first], cosine[..., first], out=turned[..., first])
        turned[..., first].addcmul_(t[..., second], sine[..., first], value=-1)
        torch.mul(t[..., second], cosine[..., second], out=turned[..., second])
        turned[..., second].addcmul_(t[..., first], sine[..., second])
        width = cosine.shape[-1]
        turned[..., width:] = t[..., width:]
        return turned

    def transposed(self) -> "Rotation":
        """The transposed linear map, which turns back."""
        return Rotation(self.cosine_S11H, -self.sine_S11H, self.first, self.second)

    def at(self, positions: slice, dtype: torch.dtype) -> "Rotation":
        """The rotation of these positions of S."""
        cosine, sine = (table[positions].to(dtype) for table in (self.cosine_S11H, self.sine_S11H))
        return Rotation(cosine, sine, self.first, self.second)


def rotations(module: SelfAttention, rotary_pos_emb: Rotary, dtype: torch.dtype) -> tuple[Rotation | None, ...]:
    """How queries and keys are rotated, of what Megatron gives the layer; None for not at all."""
    without = module.config.no_rope_freq and module.config.no_rope_freq[module.layer_number - 1]
    if rotary_pos_emb is None or without:
        return None, None
    of_both = not isinstance(rotary_pos_emb, tuple) or rotary_pos_emb[0] is rotary_pos_emb[1]
    given = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,)
    found = tuple(_rotation(module, angles_S11H, dtype) for angles_S11H in (given[:1] if of_both else given))
    return found * 2 if of_both else found


def _rotation(module: SelfAttention, angles_S11H: Tensor, dtype: torch.dtype) -> Rotation:
    width, scale = angles_S11H.shape[-1], module._yarn_concentration_factor
    cosine, sine = ((f(angles_S11H) * scale).to(dtype) for f in (torch.cos, torch.sin))
    if module.config.rotary_interleaved:
        return Rotation(cosine, sine, slice(0, width, 2), slice(1, width, 2))
    return Rotation(cosine, sine, slice(0, width // 2), slice(width // 2, width))


class Heads(NamedTuple):
    """What core attention takes, queries [S, B, N, H], keys and values [S, B, G, H]; how the first two were rotated.

    Tangents in `shared` come before the others.
    """

    q: Dual
    k: Dual
    v: Dual
    of_q: Rotation | None
    of_k: Rotation | None
    shared: SharedTangents | None = None

    def along(self, q_PSBNH: Tensor, k_PSBGH: Tensor, v_PSBGH: Tensor) -> "Heads":
        """The same with these tangents before its own."""
        q, k, v = (
            Dual(x.value, torch.cat([first, x.tangents]))
            for first, x in ((q_PSBNH, self.q), (k_PSBGH, self.k), (v_PSBGH, self.v))
        )
        return Heads(q, k, v, self.of_q, self.of_k)

    def written_out(self) -> "Heads":
        """The same without `shared`, whose tangents are among the others."""
        if self.shared is None:
            return self
        values = (x.value.permute(1, 2, 0, 3) for x in (self.q, self.k, self.v))
        return self.along(*(tangents.permute(0, 3, 1, 2, 4) for tangents in self.shared.of(*values)))


def heads(module: SelfAttention, x: Dual, rotary_pos_emb: Rotary) -> Heads:
    """Heads of this rank, of normed hidden states x [S, B, D]; `rotary_pos_emb` is what Megatron gives the layer."""
    if type(module) is not SelfAttention:
        raise unknown(module)
    if module.config.attention_output_gate:
        raise unsupported(module, "attention_output_gate")
    if module.attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        raise unsupported(module, f"the mask {module.attn_mask_type.name}")
    mixed = jvp(module.linear_qkv, x)
    q, k, v = map(Dual, split_heads(module, mixed.value), split_heads(module, mixed.tangents))
    if module.q_layernorm is not None:
        q = jvp(module.q_layernorm, q)
    if module.k_layernorm is not None:
        k = jvp(module.k_layernorm, k)
    of_q, of_k = rotations(module, rotary_pos_emb, q.value.dtype)
    return Heads(q.map(of_q) if of_q else q, k.map(of_k) if of_k else k, v, of_q, of_k)


def attend(module: SelfAttention, of: Heads) -> Dual:
    """What attention to these heads gives, [S, B, D]."""
    return jvp(module.linear_proj, core_attention(module.core_attention, of, module.pg_collection.cp))


def split_heads(module: SelfAttention, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [..., N, H], keys and values [..., G, H] of this rank, of what the projection of x gave.

    A query group's queries, key and value lie side by side. Where there are fewer groups than tensor-parallel ranks, a
    group is spread over ranks: it is gathered, and each rank takes its share of the group's queries.
    """
    num_heads, groups = module.num_attention_heads_per_partition, module.num_query_groups_per_partition
    width, group = module.hidden_size_per_attention_head, module.pg_collection.tp
    num_query_groups = module.config.num_query_groups
    ranks_per_group = max(1, module.world_size // num_query_groups)
    heads_per_group = num_heads // groups  # Megatron counts a spread group's heads whole
    own_group, share = divmod(group.rank(), ranks_per_group)
    if ranks_per_group > 1:
        mixed = all_gather_last_dim_from_tensor_parallel_region(mixed.contiguous(), group=group)
        mixed = mixed.chunk(num_query_groups, -1)[own_group]
    q, k, v = mixed.unflatten(-1, (groups, heads_per_group + 2, width)).split([heads_per_group, 1, 1], -2)
    q = q.flatten(-3, -2)
    if ranks_per_group > 1:
        own = num_heads // ranks_per_group
        q = q[..., share * own : (share + 1) * own, :]
    return q, k.squeeze(-2), v.squeeze(-2)


@singledispatch
def core_attention(module: torch.nn.Module, of: Heads, context_parallel: dist.ProcessGroup) -> Dual:
    """Context [S, B, N * H] of queries, keys and values."""
    raise unknown(module)


@core_attention.register
def _(module: SDPACoreAttention, of: Heads, context_parallel: dist.ProcessGroup) -> Dual:
    return causal_attention(of, module.softmax_scale, context_parallel)


def causal_attention(of: Heads, scale: float | None, context_parallel: dist.ProcessGroup) -> Dual:
    """Causal attention; under context parallelism keys and values of all ranks are gathered.

    A rank then holds two chunks of queries, zigzag, each of which sees the keys up to its own end.
    """
    ranks = context_parallel.size()
    if ranks == 1:
        return _attend(of.q, of.k, of.v, scale, of.shared)
    q, k, v, *_ = of.written_out()
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


def _attend(q: Dual, k: Dual, v: Dual, scale: float | None, shared: SharedTangents | None = None) -> Dual:
    q_BNSH, k_BGTH, v_BGTH = (x.value.permute(1, 2, 0, 3) for x in (q, k, v))
    q_PBNSH, k_PBGTH, v_PBGTH = (x.tangents.permute(0, 2, 3, 1, 4) for x in (q, k, v))
    if shared is not None or len(q.tangents):
        context_BNSH, tangents_PBNSH, _ = flash_attention_jvp(
            q_BNSH, k_BGTH, v_BGTH, q_PBNSH, k_PBGTH, v_PBGTH, scale, shared=shared
        )
    else:  # which the operator does not take
        assert q_BNSH.shape[2] == k_BGTH.shape[2], "context parallelism always comes with tangents"
        context_BNSH = torch.nn.functional.scaled_dot_product_attention(
            q_BNSH, k_BGTH, v_BGTH, is_causal=True, scale=scale, enable_gqa=q_BNSH.shape[1] != k_BGTH.shape[1]
        )
        tangents_PBNSH = q_PBNSH
    return Dual(context_BNSH.permute(2, 0, 1, 3).flatten(2), tangents_PBNSH.permute(0, 3, 1, 2, 4).flatten(3))
