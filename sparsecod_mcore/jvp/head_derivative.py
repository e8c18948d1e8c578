"""How the context of one attention head depends on a direction that is the same at every token, without a direction.

With n = r w x an RMSNorm (see shared.py), y = r^2 x / D, and q_i = R_i Q n_i, k_j = R_j K n_j, v_j = V n_j, along a
direction d: q_i' = r_i R_i Q(w d) - (y_i . d) q_i, and k_j', v_j' alike. For scores s_ij = scale q_i . k_j, their
softmax p_ij and the context o_i = sum_j p_ij v_j this gives

    o_i' = C_i [Q(w d), K(w d)] + e_i V(w d) - t_i (y_i . d) - sum_j ((p + p s)_ij v_j - (p s)_ij o_i) (y_j . d)

which is linear in D numbers by way of H-sized pieces that no direction enters: those are computed here.

Axes: B sequences, I queries of a block, J keys up to its end, H head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecod_mcore.jvp.attention import Rotation

KEYS_AT_ONCE = 1024  # whose products of values and keys are there at a time


@dataclass(frozen=True)
class HeadDerivative:
    """The pieces of o' above, for one head and one block of queries."""

    of_scores_BIHK: Tensor  # C, K = 2 H: through queries, then through keys
    of_values_BI: Tensor  # e
    own_norm_BIH: Tensor  # t
    spread_BIJ: Tensor  # p + p s
    scored_BIJ: Tensor  # p s
    context_BIH: Tensor  # o
    v_BJH: Tensor

    def lost(self, z_BIH: Tensor) -> Tensor:
        """What z_i . o_i loses along y_j . d at each key j, [B, I, J]."""
        return self.spread_BIJ * (z_BIH @ self.v_BJH.mT) - self.scored_BIJ * (z_BIH * self.context_BIH).sum(-1, True)


def head_derivative(
    q_BIH: Tensor,
    k_BJH: Tensor,
    v_BJH: Tensor,
    r_BJ: Tensor,
    scale: float,
    of_q: Rotation | None,
    of_k: Rotation | None,
) -> HeadDerivative:
    """The pieces for the last I of J positions, which see the keys up to their own; rotations are those of I and J."""
    queries, keys = q_BIH.shape[1], k_BJH.shape[1]
    hidden_IJ = q_BIH.new_ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    scores_BIJ = scale * q_BIH @ k_BJH.mT
    p_BIJ = scores_BIJ.masked_fill(hidden_IJ, -torch.inf).softmax(-1)
    scored_BIJ = p_BIJ * scores_BIJ
    o_BIH = p_BIJ @ v_BJH
    weighted_BIJ = p_BIJ * r_BJ[:, None]
    e_BI = weighted_BIJ.sum(-1)
    last_r_B = r_BJ[:, keys - queries :]
    through_q = _about_mean(p_BIJ, v_BJH, o_BIH, k_BJH) * (scale * last_r_B)[..., None, None]
    if of_q is not None:
        through_q = of_q.transposed()(through_q.transpose(0, 1)).transpose(0, 1)
    through_k = scale * _through_keys(weighted_BIJ, v_BJH, o_BIH, q_BIH, of_k)
    return HeadDerivative(
        of_scores_BIHK=torch.cat([through_q, through_k], -1),
        of_values_BI=e_BI,
        own_norm_BIH=scored_BIJ @ v_BJH - scored_BIJ.sum(-1, keepdim=True) * o_BIH,
        spread_BIJ=p_BIJ + scored_BIJ,
        scored_BIJ=scored_BIJ,
        context_BIH=o_BIH,
        v_BJH=v_BJH,
    )


def _about_mean(weights_BIJ: Tensor, v_BJH: Tensor, o_BIH: Tensor, x_BJK: Tensor) -> Tensor:
    """sum_j weights_ij (v_j - o_i) x_j^T, [B, I, H, K]."""
    sums = (-o_BIH[..., None] * (weights_BIJ @ x_BJK)[..., None, :]).flatten(2)
    parts = (t.split(KEYS_AT_ONCE, dim) for t, dim in ((weights_BIJ, 2), (v_BJH, 1), (x_BJK, 1)))
    for weights, v, x in zip(*parts, strict=True):
        sums.baddbmm_(weights, (v[..., None] * x[..., None, :]).flatten(2))
    return sums.unflatten(2, (v_BJH.shape[-1], -1))


def _through_keys(weighted_BIJ: Tensor, v_BJH: Tensor, o_BIH: Tensor, q_BIH: Tensor, of_k: Rotation | None) -> Tensor:
    """sum_j weighted_ij (v_j - o_i) (R_j^T q_i)^T: in each plane R_j^T q is q times a cosine and a sine of j."""
    ones_BJ1 = torch.ones_like(v_BJH[..., :1])
    plain_BIH1 = _about_mean(weighted_BIJ, v_BJH, o_BIH, ones_BJ1)
    through_BIHH = plain_BIH1 * q_BIH[..., None, :]
    if of_k is None:
        return through_BIHH
    first, second = of_k.first, of_k.second
    cosine_JM, sine_JM = of_k.cosine_S11H[:, 0, 0, first], of_k.sine_S11H[:, 0, 0, first]
    turns_BJM = torch.cat([cosine_JM, sine_JM], -1).expand(len(v_BJH), -1, -1)
    cosines, sines = _about_mean(weighted_BIJ, v_BJH, o_BIH, turns_BJM).chunk(2, -1)
    q_first, q_second = q_BIH[..., None, first], q_BIH[..., None, second]
    through_BIHH[..., first] = cosines * q_first + sines * q_second
    through_BIHH[..., second] = cosines * q_second - sines * q_first
    return through_BIHH
