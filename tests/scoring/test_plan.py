"""How the work of scoring is cut: every unit once, about the same cost for every worker, batches of about one size."""

import pytest

from sparsecod_mcore.scoring.plan import Unit, cost, evenly, share_of
from sparsecod_mcore.scoring.score import Chunk

LAYERS = 16


@pytest.mark.parametrize(
    ("chunks", "workers", "most"), [(1, 2, 1.01), (1, 3, 1.01), (3, 2, 1.01), (3, 8, 1.02), (1, 40, 7)]
)
def test_units_are_shared_out_evenly(chunks: int, workers: int, most: float) -> None:
    """`most`: the largest share of an equal part; with more workers than units, it is the costliest unit's."""
    units = [Unit(Chunk(k, k + 1, (1, 0)), first) for k in range(chunks) for first in range(LAYERS)]
    shares = [share_of(units, LAYERS, worker, workers) for worker in range(workers)]
    assert sorted(unit.name for share in shares for unit in share) == sorted(unit.name for unit in units)
    costs = [sum(cost(unit, LAYERS) for unit in share) for share in shares]
    assert max(costs) <= most * sum(costs) / workers
    if workers < LAYERS:  # no worker runs a chunk that another could run whole
        assert sum(len({unit.chunk for unit in share}) for share in shares) <= chunks + workers - 1


@pytest.mark.parametrize(("number", "at_most", "size"), [(17, 8, 6), (16, 8, 8), (3, 8, 3), (1, 1, 1), (9, 8, 5)])
def test_batches_are_even(number: int, at_most: int, size: int) -> None:
    assert evenly(number, at_most) == size
