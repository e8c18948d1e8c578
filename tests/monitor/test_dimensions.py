"""Moments of single dimensions: joined over ranks whose shifts differ, and stored once per step."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from sparsecod_mcore.model.residual import ADDS_PER_LAYER, MLP_ADD, MeasuredResidualAdd
from sparsecod_mcore.monitor.buffer import MomentsBuffer
from sparsecod_mcore.monitor.columns import ColumnsBuffer, DimensionMoments
from sparsecod_mcore.monitor.dimensions import DimensionSink
from sparsecod_mcore.monitor.reduction import reduce_columns
from sparsecod_mcore.ops import Moment

NUM_LAYERS, TOKENS, D = 2, 50, 12


def stream() -> torch.Tensor:
    """Tokens of a stream whose dimensions have large means, heavy tails, and one that never changes."""
    torch.manual_seed(0)
    x_TD = torch.randn(TOKENS, D) ** 3 + 500 * torch.randn(D)
    x_TD[:, 3] = 7.0
    return x_TD


def measured(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Column sums [L, A, C, D] and tokens [L, A] after residual adds of these microbatches [T, D] in layer 1."""
    columns = ColumnsBuffer(NUM_LAYERS, D, "cpu")
    buffer = MomentsBuffer(1, NUM_LAYERS, "cpu", columns)
    buffer.begin(1, with_columns=True)
    add = MeasuredResidualAdd()
    add.bind(buffer, 1, MLP_ADD)
    for x_TD in parts:
        branch = (x_TD / 4)[:, None].requires_grad_()
        add(True, False)((branch, None), (x_TD - x_TD / 4)[:, None], 0.0)
    return columns.sums_LACD, buffer.moments_ILAM[0, ..., Moment.TOKENS]


def expected_kurtosis(x_TD: torch.Tensor) -> torch.Tensor:
    distance_TD = x_TD.double() - x_TD.double().mean(0)
    kurtosis_D = (distance_TD**4).mean(0) / (distance_TD**2).mean(0) ** 2
    kurtosis_D[3] = 0
    return kurtosis_D


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check(moments: DimensionMoments, x_TD: torch.Tensor) -> None:
    torch.testing.assert_close(moments.mean_LAD[1, MLP_ADD], x_TD.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.kurtosis_LAD[1, MLP_ADD], expected_kurtosis(x_TD), rtol=2e-6, atol=0)
    expected = expected_kurtosis(x_TD)
    statistics = moments.statistics()
    torch.testing.assert_close(statistics["layer_output", "dimension_kurtosis"][1], expected.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        statistics["layer_output", "max_dimension_kurtosis"][1], expected.max(), rtol=1e-6, atol=0
    )


def test_microbatches_of_one_rank(one_rank: None) -> None:
    x_TD = stream()
    sums_LACD, tokens_LA = measured([x_TD[:9], x_TD[9:]])
    assert tokens_LA[1, MLP_ADD] == TOKENS and not sums_LACD[0].any()
    check(reduce_columns(sums_LACD, tokens_LA, replicated=False), x_TD)


def test_ranks_with_shifts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks and a replica of the first, as threads."""
    x_TD = stream()
    ranks = [(*measured([x_TD[:9], x_TD[9:30]]), False), (*measured([x_TD[30:]]), False)]
    ranks.append((*ranks[0][:2], True))
    arrived = threading.Barrier(len(ranks))
    brought: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        if arrived.wait() == 0:
            brought.clear()
        arrived.wait()
        brought.append(tensor.clone())
        arrived.wait()
        tensor.copy_(torch.stack(brought).sum(0))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(len(ranks)) as threads:
        jobs = [threads.submit(reduce_columns, *rank[:2], replicated=rank[2]) for rank in ranks]
    for job in jobs:
        check(job.result(), x_TD)


def test_store_keeps_each_step_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = (NUM_LAYERS, ADDS_PER_LAYER, D)
    moments = DimensionMoments(*torch.rand(3, *shape, dtype=torch.float64))
    sink = DimensionSink(tmp_path, 0)
    for iteration in (100, 200, 300):
        sink.append(iteration, 10 * iteration, moments)
    (tmp_path / "step-000000400.parquet.tmp").write_bytes(b"half")
    DimensionSink(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000100.parquet", "step-000000200.parquet"]
    rows = pq.read_table(tmp_path / "step-000000200.parquet").to_pylist()
    assert len(rows) == NUM_LAYERS * ADDS_PER_LAYER * D
    assert rows[-1] == {
        "iteration": 200,
        "tokens": 2000,
        "layer": 1,
        "stream": "layer_output",
        "dimension": D - 1,
        "mean": moments.mean_LAD[1, 1, -1].item(),
        "variance": moments.variance_LAD[1, 1, -1].item(),
        "kurtosis": moments.kurtosis_LAD[1, 1, -1].item(),
    }
