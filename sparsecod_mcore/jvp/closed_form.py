"""The token-averaged Jacobian of a dense layer, as a matrix, for about what H directions cost instead of D.

Summed over tokens i, what the MLP adds is W_2 sum_i m_i (I + A_i): row f of m_i says how activation f of token i
depends on its hidden state behind attention, and A_i how what attention adds depends on the direction. Both are sums
of a few outer products (`Rows`, `HeadDerivative`), so that the sum over tokens can be taken first, by products of whole
matrices, and no direction has to be carried through the layer.

Axes: B sequences, S positions, of them I queries of a block and J keys up to its end; F width of the MLP, K = 2 H,
M = 3 H.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from sparsecod_mcore.jvp.attention import Heads, Rotary, attend, heads, split_heads
from sparsecod_mcore.jvp.dual import Dual, plain
from sparsecod_mcore.jvp.head_derivative import KEYS_AT_ONCE, HeadDerivative, head_derivative
from sparsecod_mcore.jvp.rows import Norm, Rows, has_rows, swiglu_rows
from sparsecod_mcore.jvp.rules import jvp
from sparsecod_mcore.jvp.shared import norm_before
from sparsecod_mcore.model.attention import SDPACoreAttention
from sparsecod_mcore.model.residual import MeasuredResidualAdd

ACTIVATIONS_AT_ONCE = 2**28  # numbers, of all tokens
QUERIES_AT_ONCE = 256
NUMBERS_AT_ONCE = 2**24  # that one head holds of its queries
ROWS_AT_ONCE = 128
PRODUCTS_AT_ONCE = 2**20  # of so many rows with tokens and H


def in_closed_form(layer: TransformerLayer) -> bool:
    """Whether `closed_form_sums` knows this layer: dense, pre-norm without norms beside, no biases, whole here."""
    attention = layer.self_attention
    return (
        type(layer) is TransformerLayer
        and isinstance(layer.cross_attention, IdentityOp)
        and type(attention) is SelfAttention
        and not layer.config.attention_output_gate
        and has_rows(layer)
        and type(attention.core_attention) is SDPACoreAttention
        and type(layer.self_attn_bda) is MeasuredResidualAdd
        and attention.q_layernorm is None
        and attention.k_layernorm is None
        and not layer.config.add_qkv_bias
        and norm_before(attention.linear_qkv, layer.input_layernorm) is not None
        and attention.pg_collection.cp.size() == 1
    )


@torch.no_grad()
def closed_form_sums(layer: TransformerLayer, hidden_SBD: Tensor, rotary_pos_emb: Rotary = None) -> Tensor:
    """Sum over the tokens of [S, B, D] of J - I for the same direction at all tokens: [D, D] float64, row k for e_k.

    Of a layer that `in_closed_form` accepts. Computed in the dtype of the input, float32 at least.
    """
    length, sequences, width = hidden_SBD.shape
    of_sequence = 8 * length * layer.config.ffn_hidden_size  # coefficients of activations, and what they are made of
    sums_DD = torch.zeros(width, width, dtype=torch.float64, device=hidden_SBD.device)
    for some in _slices(sequences, max(1, ACTIVATIONS_AT_ONCE // of_sequence)):
        sums_DD += _sums_of(layer, hidden_SBD[:, some], rotary_pos_emb)
    return sums_DD


def _sums_of(layer: TransformerLayer, hidden_SBD: Tensor, rotary_pos_emb: Rotary) -> Tensor:
    attention, mlp = layer.self_attention, layer.mlp
    dtype = torch.promote_types(hidden_SBD.dtype, torch.float32)
    given = Dual(hidden_SBD, hidden_SBD.new_empty(0, *hidden_SBD.shape))
    of = heads(attention, jvp(layer.input_layernorm, given), rotary_pos_emb)
    after = given + attend(attention, of).to(hidden_SBD.dtype)
    gate_up = jvp(mlp.linear_fc1, jvp(layer.pre_mlp_layernorm, after))

    hidden_BSD, after_BSD, gate_up_BSF = (x.transpose(0, 1).to(dtype) for x in (hidden_SBD, after.value, gate_up.value))
    context = Context.in_layer(layer, of, Norm.before(attention.linear_qkv, layer.input_layernorm, hidden_BSD))
    second_norm = Norm.before(mlp.linear_fc1, layer.pre_mlp_layernorm, after_BSD)
    rows = swiglu_rows(gate_up_BSF, plain(mlp.linear_fc1.weight).to(dtype), second_norm)
    projection_DE = plain(attention.linear_proj.weight).to(dtype)
    own_ED, through_rows_FD = Sums(context, rows.through(projection_DE)).run()
    rows_FD = rows.summed() + through_rows_FD
    return (projection_DE.double() @ own_ED + plain(mlp.linear_fc2.weight).double() @ rows_FD).T


@dataclass(frozen=True)
class Context:
    """The heads of a layer and the maps through which they depend on the direction, the norm's weight in them."""

    of: Heads  # values [B, N or G, S, H]
    norm: Norm
    scale: float
    q_NHD: Tensor
    k_GHD: Tensor
    v_GHD: Tensor

    @classmethod
    def in_layer(cls, layer: TransformerLayer, of: Heads, norm: Norm) -> "Context":
        attention = layer.self_attention
        weight_ED = plain(attention.linear_qkv.weight).to(norm.weight_D.dtype) * norm.weight_D
        maps = (part.movedim(0, -1) for part in split_heads(attention, weight_ED.T))
        scale = attention.core_attention.softmax_scale
        return cls(of, norm, of.q.value.shape[-1] ** -0.5 if scale is None else scale, *maps)

    def head(self, head: int, sequences: slice, queries: slice) -> HeadDerivative:
        """The derivative of one head's context at a block of queries."""
        group = head * len(self.k_GHD) // len(self.q_NHD)
        keys = slice(0, queries.stop)
        dtype = self.norm.weight_D.dtype
        q_BIH = self.of.q.value[queries, sequences, head].transpose(0, 1).to(dtype)
        k_BJH, v_BJH = (x.value[keys, sequences, group].transpose(0, 1).to(dtype) for x in (self.of.k, self.of.v))
        of_q, of_k = (
            None if rotation is None else rotation.at(positions, dtype)
            for rotation, positions in ((self.of.of_q, queries), (self.of.of_k, keys))
        )
        return head_derivative(q_BIH, k_BJH, v_BJH, self.norm.r_BS[sequences, keys], self.scale, of_q, of_k)


class Sums:
    """Sums over tokens of how heads' contexts depend on the direction, and of functions of all of them.

    In float64; what each block of queries adds is computed in the dtype of `context`.
    """

    def __init__(self, context: Context, rows: Rows) -> None:
        self.context, self.rows = context, rows
        self.heads, self.width, self.hidden = context.q_NHD.shape
        self.sequences, self.functions, self.length = rows.projections[0][0].shape
        groups_N = torch.arange(self.heads) * len(context.k_GHD) // self.heads
        maps_NMD = torch.cat([context.q_NHD, context.k_GHD[groups_N], context.v_GHD[groups_N]], 1)
        self.maps_NMD = maps_NMD.double()
        self.own_NHM = self.maps_NMD.new_zeros(self.heads, self.width, 3 * self.width)
        self.rows_NFM = self.maps_NMD.new_zeros(self.heads, self.functions, 3 * self.width)
        self.own_ED = self.maps_NMD.new_zeros(self.heads * self.width, self.hidden)
        self.rows_FD = self.maps_NMD.new_zeros(self.functions, self.hidden)

    def run(self) -> tuple[Tensor, Tensor]:
        """Of contexts [E, D], and of functions [F, D]."""
        of_block = 2 * min(self.length, QUERIES_AT_ONCE) + min(self.length, KEYS_AT_ONCE)
        for sequences in _slices(self.sequences, max(1, NUMBERS_AT_ONCE // (of_block * self.width**2))):
            y_BSD = self.context.norm.y_BSD[sequences]
            own_BNHS = y_BSD.new_zeros(len(y_BSD), self.heads, self.width, self.length)  # what y . d is multiplied by
            rows_BFS = y_BSD.new_zeros(len(y_BSD), self.functions, self.length)
            for queries in _slices(self.length, QUERIES_AT_ONCE):
                self._add_block(sequences, queries, own_BNHS, rows_BFS)
            self.own_ED -= (own_BNHS.flatten(1, 2) @ y_BSD).double().sum(0)
            self.rows_FD -= (rows_BFS @ y_BSD).double().sum(0)
        own_ED = self.own_ED + (self.own_NHM @ self.maps_NMD).flatten(0, 1)
        of_all_heads = self.rows_NFM.transpose(0, 1).flatten(1) @ self.maps_NMD.flatten(0, 1)
        return own_ED, self.rows_FD + of_all_heads

    def _add_block(self, sequences: slice, queries: slice, own_BNHS: Tensor, rows_BFS: Tensor) -> None:
        """Add a block of queries: to the maps' coefficients here, and to those of y . d."""
        keys = slice(0, queries.stop)
        of_block = self.rows.part(sequences, queries, slice(None))
        shape = len(rows_BFS), queries.stop - queries.start, keys.stop
        lost_BIJ = [rows_BFS.new_zeros(shape) for _ in of_block.of_tokens]
        own_norm = []
        for head in range(self.heads):
            o = self.context.head(head, sequences, queries)
            of_head = self.rows.part(sequences, queries, slice(head * self.width, (head + 1) * self.width))
            self.own_NHM[head] += _own_sums(o)
            self.rows_NFM[head] += _row_sums(o, of_head)
            own_BNHS[:, head, :, keys] += o.v_BJH.mT * o.spread_BIJ.sum(1, keepdim=True)
            own_BNHS[:, head, :, keys] -= o.context_BIH.mT @ o.scored_BIJ
            own_BNHS[:, head, :, queries] += o.own_norm_BIH.mT
            _add_lost(o, of_head.projections, rows_BFS[..., keys])
            for (_, z_BIH), sums_BIJ in zip(of_head.of_tokens, lost_BIJ, strict=True):
                sums_BIJ += o.lost(z_BIH)
            own_norm.append(o.own_norm_BIH)
        rows_BFS[..., queries] += of_block.along(torch.cat(own_norm, -1))
        for (c_BFI, _), sums_BIJ in zip(of_block.of_tokens, lost_BIJ, strict=True):
            rows_BFS[..., keys] += c_BFI @ sums_BIJ


def _slices(length: int, at_once: int) -> Iterator[slice]:
    return (slice(first, min(first + at_once, length)) for first in range(0, length, at_once))


def _own_sums(o: HeadDerivative) -> Tensor:
    """Summed over tokens, o' along Q d, K d and V d, [H, 3H]."""
    of_values_HH = o.of_values_BI.sum() * torch.eye(o.v_BJH.shape[-1], dtype=o.v_BJH.dtype, device=o.v_BJH.device)
    return torch.cat([o.of_scores_BIHK.sum((0, 1)), of_values_HH], -1)


def _row_sums(o: HeadDerivative, rows: Rows) -> Tensor:
    """Summed over tokens, functions of o' along Q d, K d and V d, [F, 3H]."""
    of_values = Rows(
        [(c * o.of_values_BI[:, None], w) for c, w in rows.projections],
        [(c, z * o.of_values_BI[..., None]) for c, z in rows.of_tokens],
    )
    of_scores_FK = _projected(rows.projections, o.of_scores_BIHK)
    for c_BFI, z_BIH in rows.of_tokens:
        of_scores_FK += (c_BFI @ (z_BIH[..., None, :] @ o.of_scores_BIHK).squeeze(-2)).sum(0)
    return torch.cat([of_scores_FK, of_values.summed()], -1)


def _projected(projections: list[tuple[Tensor, Tensor]], x_BIHK: Tensor) -> Tensor:
    """Sum over tokens and h of c_bfi w_fh x_bihk, over all pairs c and w, [F, K].

    Products of c and w are summed over pairs before anything is multiplied by x, a cache full of them at a time.
    """
    c_FTW = torch.stack([c_BFI.transpose(0, 1).flatten(1) for c_BFI, _ in projections], -1)
    w_FWH = torch.stack([w_FH for _, w_FH in projections], 1)
    x_THK = x_BIHK.flatten(0, 1)
    width = x_THK.shape[1]
    sums_FK = x_THK.new_zeros(len(w_FWH), x_THK.shape[-1])
    for tokens in _slices(len(x_THK), max(1, PRODUCTS_AT_ONCE // (ROWS_AT_ONCE * width))):
        x_MK = x_THK[tokens].flatten(0, 1)
        products = x_MK.new_empty(ROWS_AT_ONCE * len(x_MK))
        for some in _slices(len(w_FWH), ROWS_AT_ONCE):
            w_of_some = w_FWH[some]
            products_FTH = products[: len(w_of_some) * len(x_MK)].view(len(w_of_some), -1, width)
            torch.bmm(c_FTW[some, tokens], w_of_some, out=products_FTH)
            sums_FK[some].addmm_(products_FTH.flatten(1), x_MK)
    return sums_FK


def _add_lost(o: HeadDerivative, projections: list[tuple[Tensor, Tensor]], sums_BFJ: Tensor) -> None:
    """Add what functions c (w . o) lose along y_j . d at each key j."""
    of_context_BFI = torch.zeros_like(projections[0][0])
    for c_BFI, w_FH in projections:
        sums_BFJ.addcmul_(c_BFI @ o.spread_BIJ, w_FH @ o.v_BJH.mT)
        of_context_BFI.addcmul_(c_BFI, w_FH @ o.context_BIH.mT)
    sums_BFJ -= of_context_BFI @ o.scored_BIJ
