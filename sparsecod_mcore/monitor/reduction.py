"""One exact reduction over every rank of the job."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sparsecod_mcore.ops import Moment

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
