"""How the activations of an MLP depend on a token's hidden state, as rows that can be summed over tokens first.

Activation f of token t is along u of its hidden state c_tf (w_f . u) with a few c and w, and what the norm before takes
away.

Axes: B sequences, S positions, F width of the MLP.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import add

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from sparsecod_mcore.jvp.rules import is_swiglu
from sparsecod_mcore.jvp.shared import norm_before
from sparsecod_mcore.model.residual import MeasuredResidualAdd


@dataclass(frozen=True)
class Norm:
    """An RMSNorm n = r w x: along u it is r w u - (y . u) n, with y = r^2 x / D."""

    weight_D: Tensor
    r_BS: Tensor
    y_BSD: Tensor

    @classmethod
    def before(cls, projection: torch.nn.Module, norm: torch.nn.Module, x_BSD: Tensor) -> "Norm":
        found = norm_before(projection, norm)
        assert found is not None
        weight_D, eps = found
        r_BS = (x_BSD.square().mean(-1) + eps).rsqrt()
        return cls(weight_D.to(x_BSD.dtype), r_BS, r_BS.square()[..., None] * x_BSD / x_BSD.shape[-1])


@dataclass(frozen=True)
class Rows:
    """F functions of a token's state: along u, sum over w of c_bfs (w_f . u) and over z of c_bfs (z_bs . u).

    `projections` holds pairs of c [B, F, S] and w [F, D], `of_tokens` pairs of c [B, F, S] and z [B, S, D].
    """

    projections: list[tuple[Tensor, Tensor]]
    of_tokens: list[tuple[Tensor, Tensor]]

    def summed(self) -> Tensor:
        """Summed over tokens, [F, D] in float64."""
        of_weights = (c.double().sum((0, 2))[:, None] * w for c, w in self.projections)
        of_tokens = ((c @ z).double().sum(0) for c, z in self.of_tokens)
        return reduce(add, chain(of_weights, of_tokens))

    def through(self, weight_DE: Tensor) -> "Rows":
        """The same functions of a state that is W x, as functions of x."""
        return Rows([(c, w @ weight_DE) for c, w in self.projections], [(c, z @ weight_DE) for c, z in self.of_tokens])

    def part(self, sequences: slice, positions: slice, width: slice) -> "Rows":
        """At these tokens, along these dimensions of u."""
        at = sequences, slice(None), positions
        return Rows(
            [(c[at], w[:, width]) for c, w in self.projections],
            [(c[at], z[sequences, positions, width]) for c, z in self.of_tokens],
        )

    def along(self, u_BSD: Tensor) -> Tensor:
        """Along u of each token, [B, F, S]."""
        of_weights = (c * (w @ u_BSD.mT) for c, w in self.projections)
        of_tokens = (c * (z * u_BSD).sum(-1)[:, None] for c, z in self.of_tokens)
        return reduce(add, chain(of_weights, of_tokens))


def swiglu_rows(gate_up_BSF: Tensor, weight_FD: Tensor, norm: Norm) -> Rows:
    """The activations silu(g) u of an MLP with the first projection [2F, D] behind `norm`."""
    gate_BSF, up_BSF = gate_up_BSF.chunk(2, -1)
    sigmoid = gate_BSF.sigmoid()
    of_up = gate_BSF * sigmoid
    of_gate = up_BSF * (sigmoid + of_up * (1 - sigmoid))
    r_BS1 = norm.r_BS[..., None]
    gate_FD, up_FD = (weight_FD * norm.weight_D).chunk(2)
    of_norm = (of_gate * gate_BSF).addcmul_(of_up, up_BSF).neg_()
    return Rows([((of_gate * r_BS1).mT, gate_FD), ((of_up * r_BS1).mT, up_FD)], [(of_norm.mT, norm.y_BSD)])


def has_rows(layer: TransformerLayer) -> bool:
    """Whether what the layer's MLP adds to the stream is `swiglu_rows`, whole on this rank, through a projection."""
    mlp = layer.mlp
    return (
        type(mlp) is MLP
        and is_swiglu(mlp.config)
        and type(layer.mlp_bda) is MeasuredResidualAdd
        and not layer.config.add_bias_linear
        and norm_before(mlp.linear_fc1, layer.pre_mlp_layernorm) is not None
        and isinstance(mlp.linear_fc2, RowParallelLinear)
        and layer.self_attention.pg_collection.tp.size() == 1
    )
