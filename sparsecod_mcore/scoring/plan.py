"""How the work is cut: into chunks of sequences that memory has room for, into units, and among workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from sparsecod_mcore import platform
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.scoring.score import Chunk, Score
from sparsecod_mcore.scoring.stack import Stack

# As many tokens as matrix products need to run at full speed, and hardly more: the rest of a layer wants caches, and
# the C library gives memory of more than 32 MiB back to the system each time, to be asked for page by page again.
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True)
class Unit:
    """What a worker does in one go and records as one line: interventions that start at `first`, on one chunk."""

    chunk: Chunk
    first: int

    @property
    def name(self) -> str:
        return f"sequences {self.chunk.begin} to {self.chunk.end}, from layer {self.first}"


@dataclass(frozen=True)
class Plan:
    """Chunks of sequences, and how many tokens a layer is given at most."""

    chunks: tuple[Chunk, ...]
    tokens_at_once: int


def make_plan(stack: Stack, scores: Sequence[Score], sequences: int, length: int, budget: int | None) -> Plan:
    """Chunks of about `TOKENS_AT_ONCE`, or of fewer where `budget` bytes beside the model's own do not hold them.

    The same for every number of workers. Raises `UserError` if `budget` does not hold one sequence.
    """
    wanted = max(1, TOKENS_AT_ONCE["cuda" if platform.has_gpu() else "cpu"] // length)
    if budget is not None:
        fixed, per_token = sum(score.held_bytes() for score in scores), bytes_per_token(stack)
        fitting = (budget - fixed) // (per_token * length)
        if fitting < 1:
            raise UserError(
                f"a memory budget of {budget / 2**20:.0f} MiB does not hold one sequence of length {length}, "
                f"which takes about {(fixed + per_token * length) / 2**20:.0f} MiB"
            )
        wanted = min(wanted, fitting)
    count, half = -(-sequences // wanted), sequences // 2 if sequences > 1 else sequences
    edges = [sequences * k // count for k in range(count + 1)]
    of_first = [min(max(half - begin, 0), end - begin) for begin, end in pairwise(edges)]
    chunks = (
        Chunk(begin, end, (first, end - begin - first))
        for (begin, end), first in zip(pairwise(edges), of_first, strict=True)
    )
    return Plan(tuple(chunks), max(length, wanted * length))


def evenly(number: int, at_most: int) -> int:
    """The size of about equal batches of at most so many: a small last one costs almost what a full one does."""
    return -(-number // -(-number // at_most))


def bytes_per_token(stack: Stack) -> int:
    """What a token of a chunk takes: h_0 to h_L, a state for each intervention of a unit, and a layer at work."""
    config = stack.model.config
    states = 2 * (stack.num_layers + 1) + 4
    experts = (config.moe_router_topk * config.moe_ffn_hidden_size) if config.num_moe_experts else 0
    inner = 6 * max(config.ffn_hidden_size, experts) + 8 * stack.hidden_size
    return (states * stack.hidden_size + inner) * stack.dtype.itemsize


def cost(unit: Unit, num_layers: int) -> int:
    """About how many layers a unit runs, up to a factor: as many interventions start there as layers are above."""
    return (num_layers - unit.first) ** 2 * (unit.chunk.end - unit.chunk.begin)


def share_of(units: Sequence[Unit], num_layers: int, worker: int, workers: int) -> list[Unit]:
    """A worker's units: of few chunks, so that few are run twice, and of about the same cost for every worker.

    Chunks are dealt out in order, as intervals of their cost. Where one falls to several workers, each of its units,
    the costliest first, goes to the worker that misses most of its part.
    """
    quota = sum(cost(unit, num_layers) for unit in units) / workers
    done, mine = 0, []
    for _, group in groupby(units, key=lambda unit: unit.chunk):
        of_chunk = sorted(group, key=lambda unit: cost(unit, num_layers), reverse=True)
        end = done + sum(cost(unit, num_layers) for unit in of_chunk)
        missing = {k: min((k + 1) * quota, end) - max(k * quota, done) for k in range(workers)}
        for unit in of_chunk:
            taker = max(missing, key=missing.__getitem__)
            missing[taker] -= cost(unit, num_layers)
            if taker == worker:
                mine.append(unit)
        done = end
    return mine
