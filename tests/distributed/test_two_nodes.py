"""A job over two nodes trains what one process does, and outlives a cable that is pulled and a node that dies."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.jobs import Data, Job, assert_same_losses, assert_same_statistics, command, environment, train
from tests.distributed.two_nodes import Program, TwoNodes, two_nodes

pytestmark = pytest.mark.distributed

STEPS = 24
FLAGS = ("--train-iters", STEPS, "--log-interval", 1, "--save-interval", 4, "--cod-jacobian-interval", 0)
TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, dense_config: Path, data: Data, dense_start: tuple) -> Job:
    return train(tmp_path_factory.mktemp("one_process"), dense_config, data, *dense_start, *FLAGS)


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as both:
        yield both


def begin(nodes: TwoNodes, processes: int, run: Path, config: Path, data: Data, *flags: object) -> list[Program]:
    python, *program = command(run, config, data, *flags, *FLAGS)
    assert python == sys.executable
    return nodes.torchrun(python, processes, program, environment())


def assert_ends_with_a_clear_message(program: Program, since: float, seconds: float) -> None:
    code = program.end(since + seconds - time.monotonic())
    said = [line for line in program.said if line.startswith("error: ")]
    assert code == 1 and len(said) == 1, program.text()[-4000:]
    assert "lost contact with another process" in said[0] and "the same command goes on from there" in said[0]


def assert_finished(programs: list[Program], run: Path, one_process: Job) -> None:
    for program in programs:
        assert program.end(120) == 0, program.text()[-4000:]
    job = Job(run, 0, programs[-1].text(), "")
    assert_same_losses(job, one_process, TOLERANCE)
    assert_same_statistics(job, one_process, TOLERANCE)


@pytest.mark.slow
def test_a_node_dies(
    nodes: TwoNodes, one_process: Job, tmp_path: Path, dense_config: Path, data: Data, dense_start: tuple
) -> None:
    """The pipeline goes over the cable. The last stage's node dies; the job ends, and begins again from its save."""
    job = (nodes, 1, tmp_path, dense_config, data, *dense_start, *PP2)
    first, last = begin(*job)
    last.wait_for(f"step  6/{STEPS}", 90)
    died = time.monotonic()
    nodes.second.kill()
    assert_ends_with_a_clear_message(first, died, 45)
    again = begin(*job)
    assert_finished(again, tmp_path, one_process)
    assert not any(line.startswith("step  4/") for line in again[1].said), "it went on from the save at step 4 or later"


@pytest.mark.slow
def test_a_cable_is_pulled(
    nodes: TwoNodes, one_process: Job, tmp_path: Path, dense_config: Path, data: Data, dense_start: tuple
) -> None:
    """Tensor parallelism inside of each node, data parallelism over the cable. Training ends on both nodes.

    torchrun's agent on the node that is cut off tries for longer to reach its rendezvous: it is killed here, as a
    scheduler kills it.
    """
    where = (nodes, 2, tmp_path, dense_config, data)
    flags = (*dense_start, *TP2, "--distributed-timeout-seconds-after-init", 15)
    programs = begin(*where, *flags)
    programs[1].wait_for(f"step  6/{STEPS}", 120)
    nodes.cable("down")
    for program in programs:
        program.wait_for("error: lost contact with another process", 60)
    for node in (nodes.first, nodes.second):
        node.kill()
    nodes.cable("up")
    assert_finished(begin(*where, *flags), tmp_path, one_process)
