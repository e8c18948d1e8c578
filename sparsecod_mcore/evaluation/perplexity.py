"""The loss on held-out sequences, over all and by position.

Axes: N sequences, T positions, C sequences of a chunk.
"""

import math
from itertools import pairwise

import torch

from sparsecod_mcore.evaluation.results import Estimate, Perplexity
from sparsecod_mcore.evaluation.units import Record, run_units, tokens_at_once
from sparsecod_mcore.scoring.provenance import hash_tokens
from sparsecod_mcore.scoring.stack import Stack
from sparsecod_mcore.scoring.work_file import WorkFiles

type Chunk = tuple[int, int]  # its first sequence, and the first that is not in it


def perplexity(
    stack: Stack, tokens_NT: torch.Tensor, batch_tokens: int | None = None, files: WorkFiles[Record] | None = None
) -> Perplexity:
    """Of `tokens_NT` [N, T + 1]: inputs and targets, one further. Collective, with the same result on every rank."""
    count, length = tokens_NT.shape[0], tokens_NT.shape[1] - 1
    step = max(1, tokens_at_once(stack, batch_tokens) // length)
    edges = [*range(0, count, step), count]
    data = hash_tokens(tokens_NT.numpy())
    chunks = {f"sequences {begin} to {end} of {data}": (begin, end) for begin, end in pairwise(edges)}

    def run(chunk: Chunk) -> Record:
        return _sums(_losses(stack, tokens_NT[slice(*chunk)]))

    def tokens_of(chunk: Chunk) -> int:
        return (chunk[1] - chunk[0]) * length

    return _result(list(run_units("perplexity", chunks, run, tokens_of, files).values()), count, length)


def _losses(stack: Stack, tokens_CT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [C, T] in nats."""
    tokens_CT = tokens_CT.to(stack.device)
    hidden_TCD = stack.embed(tokens_CT[:, :-1])
    for layer in range(stack.num_layers):
        hidden_TCD = stack.layer(layer, hidden_TCD)
    return stack.losses(hidden_TCD, tokens_CT[:, 1:])


def _sums(losses_CT: torch.Tensor) -> Record:
    losses_CT = losses_CT.double()
    return {
        "sequences": losses_CT.mean(dim=1).tolist(),
        "positions": losses_CT.sum(dim=0).tolist(),
        "squares": losses_CT.square().sum(dim=0).tolist(),
    }


def _result(records: list[Record], count: int, length: int) -> Perplexity:
    loss = Estimate.of_mean([mean for record in records for mean in record["sequences"]])
    positions_T = torch.tensor([record["positions"] for record in records], dtype=torch.float64).sum(0) / count
    squares_T = torch.tensor([record["squares"] for record in records], dtype=torch.float64).sum(0) / count
    # A mean of N has the variance of one over N; that of one is estimated with N − 1.
    variance_T = (squares_T - positions_T.square()).clamp_min(0) / (count - 1) if count > 1 else squares_T * math.nan
    scale = math.exp(loss.value)
    return Perplexity(
        sequences=count,
        length=length,
        loss=loss,
        perplexity=Estimate(value=scale, stderr=scale * loss.stderr),
        loss_by_position=positions_T.tolist(),
        stderr_by_position=variance_T.sqrt().tolist(),
    )
