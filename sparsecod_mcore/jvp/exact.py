"""The token-averaged Jacobian of a layer, as a matrix or along many directions, in batches."""

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from sparsecod_mcore.jvp.attention import Rotary
from sparsecod_mcore.jvp.closed_form import closed_form_sums, in_closed_form
from sparsecod_mcore.jvp.layer import probe_branches

TOKENS_AT_ONCE = 16384  # times directions: what is in flight grows with both


def deviation_sums(
    layer: TransformerLayer,
    hidden_SBD: Tensor,
    rotary_pos_emb: Rotary = None,
) -> Tensor:
    """Sum over the tokens of [S, B, D] of (J - I) e_k, e_k at every token: [D, D] float64, row k for e_k.

    Divided by the number of tokens, and transposed, it is J_bar - I of the paper's definition. Sums of several inputs
    or ranks add up. In closed form where there is one, else by D directions. Collective over the ranks that hold parts
    of the layer.
    """
    if in_closed_form(layer):
        return closed_form_sums(layer, hidden_SBD, rotary_pos_emb)
    width = hidden_SBD.shape[-1]
    unit_DD = torch.eye(width, dtype=hidden_SBD.dtype, device=hidden_SBD.device)
    return directional_sums(layer, hidden_SBD, unit_DD, rotary_pos_emb)


def directional_sums(
    layer: TransformerLayer,
    hidden_SBD: Tensor,
    shared_PD: Tensor,
    rotary_pos_emb: Rotary = None,
) -> Tensor:
    """Sum over the tokens of [S, B, D] of (J - I) v, v of `shared_PD` at every token: [P, D] float64. Collective."""
    sums = []
    for few_PD in shared_PD.split(max(1, TOKENS_AT_ONCE // hidden_SBD[..., 0].numel())):
        probed = probe_branches(layer, hidden_SBD, few_PD, rotary_pos_emb=rotary_pos_emb)
        sums.append(probed.attention_sums + probed.mlp_sums)
    return torch.cat(sums)
