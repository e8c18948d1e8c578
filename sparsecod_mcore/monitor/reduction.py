"""One exact reduction over every rank of the job."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sparsecod_mcore.monitor.columns import DimensionMoments
from sparsecod_mcore.ops import ColumnSum, Moment

MAXIMA = [moment for moment in Moment if moment.name.endswith("_MAX")]


def holds_replicated_tokens(sequence_parallel: bool) -> bool:
    """Whether another rank has measured the very same tokens and layers, and counts them instead of this one.

    Tensor-parallel ranks see the same residual stream, unless sequence parallelism splits it among them. Data and
    context parallel ranks hold other tokens, expert parallel ranks are data parallel to the residual stream, and
    pipeline stages hold other layers.
    """
    return not sequence_parallel and parallel_state.get_tensor_model_parallel_rank() > 0


def reduce_over_ranks(moments_M: torch.Tensor, *, replicated: bool) -> torch.Tensor:
    """Return the moments [..., M] over all tokens and layers of the job, the same on every rank.

    Every stage's buffer has the whole model's shape with zeros for other stages' layers, so one sum over the world
    joins tokens and stages alike; maxima of magnitudes (>= 0) need a second, as small. Collective: all ranks call it.
    """
    contribution_M = torch.zeros_like(moments_M) if replicated else moments_M.clone()
    maxima_M = contribution_M[..., MAXIMA].contiguous()
    dist.all_reduce(contribution_M)
    dist.all_reduce(maxima_M, op=dist.ReduceOp.MAX)
    contribution_M[..., MAXIMA] = maxima_M
    return contribution_M


def reduce_columns(sums_LACD: torch.Tensor, tokens_LA: torch.Tensor, *, replicated: bool) -> DimensionMoments:
    """Return the moments of every dimension over all tokens of the job, on the host, the same on every rank.

    Ranks took their sums about shifts of their own. Once the mean over all is known, each moves its sums there: what
    is added up are central moments, with nothing left to cancel. `tokens_LA` are this rank's. Collective.
    """
    if replicated:
        sums_LACD, tokens_LA = torch.zeros_like(sums_LACD), torch.zeros_like(tokens_LA)
    n_LA1 = tokens_LA[..., None]
    shift_LAD, first_LAD, second_LAD, third_LAD, fourth_LAD = sums_LACD.unbind(-2)
    assert (ColumnSum.SHIFT, ColumnSum.FIRST, ColumnSum.FOURTH) == (0, 1, 4)
    totals = torch.cat([n_LA1, n_LA1 * shift_LAD + first_LAD], dim=-1)
    dist.all_reduce(totals)
    all_n_LA1, mean_LAD = totals[..., :1], totals[..., 1:] / totals[..., :1]
    # y - mean = (y - shift) + by
    by_LAD = torch.where(n_LA1 > 0, shift_LAD - mean_LAD, 0)
    central = torch.stack(
        [
            second_LAD + by_LAD * (2 * first_LAD + by_LAD * n_LA1),
            fourth_LAD
            + by_LAD * (4 * third_LAD + by_LAD * (6 * second_LAD + by_LAD * (4 * first_LAD + by_LAD * n_LA1))),
        ]
    )
    dist.all_reduce(central)
    second_LAD, fourth_LAD = (central / all_n_LA1).cpu()
    return DimensionMoments(mean_LAD.cpu(), second_LAD, fourth_LAD)
