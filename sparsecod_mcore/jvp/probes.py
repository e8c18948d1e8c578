"""Jacobian statistics of layers from a few directions, as sums that ranks can add up.

Axes: L layers of the whole model, R parts of a layer's Jacobian (attention branch, MLP branch), T streams (both
together, and each), U sequences of independent noise, and those of the package.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from sparsecod_mcore.jvp.attention import Rotary
from sparsecod_mcore.jvp.directions import Noise, Place
from sparsecod_mcore.jvp.layer import probe_branches
from sparsecod_mcore.ops import NUM_PROBE_MOMENTS, ProbeMoment, probe_moments

STREAMS = ("jacobian", "jacobian_attention", "jacobian_mlp")
NUM_PARTS = 2


@dataclass
class ProbeSums:
    """What one step's probes leave, float64; of the whole model's shape on every rank, zero for others' layers."""

    shared_LRPD: Tensor  # sum over tokens of the parts' u, v the same at all tokens
    products_LRP: Tensor  # sum over tokens of v . u, of the same
    tokens_L: Tensor  # how many tokens those are
    squares_LTU: Tensor  # sum over a sequence's tokens of ||u||^2, v of each token its own
    residual_LT: Tensor  # sum over tokens of h . u along the residual stream h itself
    residual_squares_LT: Tensor  # sum over tokens of ||u||^2 along it
    residual_norms_L: Tensor  # sum over tokens of ||h||^2

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, field.name) for field in fields(self))

    def zero_(self) -> None:
        for tensor in self:
            tensor.zero_()


@dataclass(frozen=True)
class Probing:
    """How a layer is probed: `num_probes` directions of each kind of noise, and the residual stream if asked.

    Where each token has noise of its own, each sequence is a probe of its own: `num_sequences` of them, on all ranks,
    may need fewer rounds than there are probes.
    """

    num_probes: int
    num_sequences: int
    along_residual: bool = False

    @property
    def rounds(self) -> int:
        """Rounds of independent noise."""
        return -(-self.num_probes // self.num_sequences)

    def zeros(self, num_layers: int, hidden_size: int, batch_size: int, device: torch.types.Device) -> ProbeSums:
        """Sums of nothing."""
        parts = (num_layers, NUM_PARTS, self.num_probes)
        streams = (num_layers, len(STREAMS))
        shapes = (
            (*parts, hidden_size), parts, (num_layers,),
            (*streams, self.rounds * batch_size),
            streams, streams, (num_layers,),
        )  # fmt: skip
        return ProbeSums(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


@torch.no_grad()
def probe_layer(
    layer: TransformerLayer,
    hidden_SBD: Tensor,
    rotary_pos_emb: Rotary,
    probing: Probing,
    noise: Noise,
    place: Place,
    sums: ProbeSums,
) -> None:
    """Add to `sums` what one round of probes says of `layer` at its input; all directions run as one batch.

    Collective over the ranks that hold parts of the layer.
    """
    index = noise.layer
    batch_size, width = hidden_SBD.shape[1:]
    shared_PD = noise.shared(probing.num_probes, width)
    rounds = [noise.own(number, place, batch_size, width) for number in range(probing.rounds)]
    along = [hidden_SBD] if probing.along_residual else []
    probed = probe_branches(layer, hidden_SBD, shared_PD, torch.stack([*rounds, *along]), rotary_pos_emb)

    for part, sums_PD in enumerate((probed.attention_sums, probed.mlp_sums)):
        sums.shared_LRPD[index, part] += sums_PD
        sums.products_LRP[index, part] += (shared_PD.double() * sums_PD).sum(-1)
    sums.tokens_L[index] += hidden_SBD[..., 0].numel()

    for stream, u_QSBD in enumerate((probed.attention + probed.mlp, probed.attention, probed.mlp)):
        for number, v_SBD in enumerate(rounds):
            units = slice(number * batch_size, (number + 1) * batch_size)
            sums.squares_LTU[index, stream, units] += _moments(v_SBD, u_QSBD[number])[:, ProbeMoment.SQUARED_NORM]
        if along:
            moments = _moments(hidden_SBD, u_QSBD[-1]).sum(0)
            sums.residual_LT[index, stream] += moments[ProbeMoment.PRODUCT]
            sums.residual_squares_LT[index, stream] += moments[ProbeMoment.SQUARED_NORM]
    if along:
        sums.residual_norms_L[index] += hidden_SBD.double().square().sum()


def _moments(v_SBD: Tensor, u_SBD: Tensor) -> Tensor:
    """Moments [B, NUM_PROBE_MOMENTS] of each sequence."""
    batch_size, width = u_SBD.shape[1:]
    sums_BD = torch.zeros(batch_size, width, dtype=torch.float64, device=u_SBD.device)
    moments = torch.zeros(batch_size, NUM_PROBE_MOMENTS, dtype=torch.float64, device=u_SBD.device)
    probe_moments(v_SBD.transpose(0, 1), u_SBD.transpose(0, 1), sums_BD, moments)
    return moments
