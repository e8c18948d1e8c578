"""Every parallel layout trains the same model and measures the same statistics as one process."""

from pathlib import Path

import pytest

from tests.distributed.jobs import Data, Job, assert_same_losses, assert_same_statistics, train

pytestmark = pytest.mark.distributed

TP2 = ("--tensor-model-parallel-size", 2)
SP = ("--sequence-parallel",)
PP2 = ("--pipeline-model-parallel-size", 2)
CP2 = ("--context-parallel-size", 2)
EP2 = ("--expert-model-parallel-size", 2)
DISTRIBUTED_OPTIMIZER = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1)

# Jacobians are probed on the first microbatch: two ranks together are to take as many sequences as one process does.
PER_RANK = ("--micro-batch-size", 1)

DENSE_LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2 + SP),
    "pp2": (2, PP2),
    "pp2_interleaved": (2, (*PP2, "--num-layers-per-virtual-pipeline-stage", 1)),
    "dp2": (2, PER_RANK),
    "cp2": (2, CP2),
    "dp2_distributed_optimizer": (2, DISTRIBUTED_OPTIMIZER + PER_RANK),
    "tp2_pp2": (4, TP2 + PP2),
    "tp4": (4, ("--tensor-model-parallel-size", 4)),  # each of the two query groups is spread over two ranks
    "recompute": (1, RECOMPUTE),
    "tp2_sp_recompute": (2, TP2 + SP + RECOMPUTE),
}
MOE_LAYOUTS = {
    "ep2": (2, EP2),
    "ep2_distributed_optimizer": (2, EP2 + DISTRIBUTED_OPTIMIZER),
    "ep2_tp2_sp": (4, (*EP2, *TP2, *SP, "--expert-tensor-parallel-size", 1)),
}
# Beyond what is needed to trust the others; `make test-slow` runs them. Of those that are long, others do each half.
SLOW = {"tp4", "pp2_interleaved", "cp2", "ep2_tp2_sp"}
LONG = {"tp2_sp_recompute", "ep2_distributed_optimizer"}
TOLERANCE = 1e-4


def marked(layouts: dict[str, tuple]) -> list:
    marks = {name: [pytest.mark.slow] for name in SLOW} | {name: [pytest.mark.long] for name in LONG}
    return [pytest.param(name, marks=marks.get(name, [])) for name in layouts]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, dense_config: Path, data: Data, dense_start: tuple) -> Job:
    """The dense model on one process."""
    return train(tmp_path_factory.mktemp("dense"), dense_config, data, *dense_start)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory, moe_config: Path, data: Data, moe_start: tuple) -> Job:
    """The MoE model on one process."""
    return train(tmp_path_factory.mktemp("moe"), moe_config, data, *moe_start)


@pytest.mark.parametrize("layout", marked(DENSE_LAYOUTS))
def test_dense(layout: str, dense: Job, tmp_path: Path, dense_config: Path, data: Data, dense_start: tuple) -> None:
    processes, flags = DENSE_LAYOUTS[layout]
    job = train(tmp_path, dense_config, data, *dense_start, *flags, processes=processes)
    assert_same_losses(job, dense, TOLERANCE)
    assert_same_statistics(job, dense, TOLERANCE)


@pytest.mark.parametrize("layout", marked(MOE_LAYOUTS))
def test_moe(layout: str, moe: Job, tmp_path: Path, moe_config: Path, data: Data, moe_start: tuple) -> None:
    processes, flags = MOE_LAYOUTS[layout]
    job = train(tmp_path, moe_config, data, *moe_start, *flags, processes=processes)
    assert_same_losses(job, moe, TOLERANCE)
    assert_same_statistics(job, moe, TOLERANCE, lambda key: not key[2].startswith("jacobian"))


def test_jacobians_of_moe(tmp_path: Path, moe_config: Path, data: Data, moe_start: tuple) -> None:
    """Two expert-parallel ranks probe the sequences that one process probes in a microbatch of twice the size.

    Of the first step only: the load-balancing loss, and so the training, depends on the size of microbatches.
    """
    once = (*moe_start, "--exit-interval", 1)
    one = train(tmp_path / "one", moe_config, data, *once, "--micro-batch-size", 4)
    two = train(tmp_path / "two", moe_config, data, *once, *EP2, processes=2)
    assert_same_statistics(two, one, TOLERANCE, lambda key: key[2].startswith("jacobian"))


def test_every_step_layer_and_stream_is_there(dense: Job) -> None:
    keys = dense.statistics().keys()
    assert {key[0] for key in keys} == set(range(1, 7))
    assert {key[1] for key in keys} == set(range(4))
    branches = {"attention", "mlp", "after_attention", "layer_output"}
    assert {key[2] for key in keys} == branches | {"jacobian", "jacobian_attention", "jacobian_mlp"}


def test_statistics_can_be_sparse_or_off(
    tmp_path: Path, dense: Job, dense_config: Path, data: Data, dense_start: tuple
) -> None:
    """Measuring less often changes neither the training, bit for bit, nor what is measured."""
    seldom = ("--cod-stats-interval", 3, "--cod-jacobian-interval", 3)
    sparse = train(tmp_path / "sparse", dense_config, data, *dense_start, *seldom)
    assert sparse.losses() == dense.losses()
    expected = {key: value for key, value in dense.statistics().items() if key[0] % 3 == 0}
    assert sparse.statistics() == expected
    never = ("--cod-stats-interval", 0, "--cod-jacobian-interval", 0)
    off = train(tmp_path / "off", dense_config, data, *dense_start, *never)
    assert off.losses() == dense.losses()
    assert not list((off.run / "stats").glob("*.parquet"))
