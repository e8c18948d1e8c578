"""Ranks and rendezvous are found in the variables of Slurm, Kubernetes and torchrun, and nothing is guessed."""

import pytest

from sparsecod_mcore.cluster.surroundings import first_host, plan
from sparsecod_mcore.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "64",
    "SLURM_NNODES": "8",
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[003-007,9],login1",
}
POD = {"MASTER_ADDR": "dense-1b-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "8", "RANK": "3"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("rack[2,4]-node[01-08]", "rack2-node01"),
        ("a-b[7],c", "a-b7"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_slurm_with_a_task_for_each_gpu() -> None:
    found = plan(SRUN, 8)
    assert found.found == "Slurm" and found.torchrun is None
    assert found.environment == {
        "RANK": "13",
        "LOCAL_RANK": "5",
        "WORLD_SIZE": "64",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": str(20000 + 4567),
    }
    assert plan(SRUN, 1).environment["LOCAL_RANK"] == "0", "of GPUs that Slurm hides all but one is there"
    assert plan(SRUN, 0).environment["LOCAL_RANK"] == "5", "on CPUs the rank within the node is what Slurm says"


def test_slurm_with_a_task_for_each_node() -> None:
    tasks = SRUN | {"SLURM_NTASKS": "8", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_RESTART_COUNT": "2"}
    arguments = " ".join(plan(tasks, 8).torchrun or ())
    assert "--nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 1234567-2" in arguments
    assert "--rdzv-endpoint gpu003:24567" in arguments and "is_host=0," in arguments
    assert "is_host=1," in " ".join(plan(tasks | {"SLURM_NODEID": "0"}, 8).torchrun or ())


def test_a_shell_inside_an_allocation_is_no_task() -> None:
    shell = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert plan(shell, 2).torchrun == ("--standalone", "--nproc-per-node", "2")


def test_kubernetes() -> None:
    pet = {"PET_NNODES": "8", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "m", "PET_MASTER_PORT": "23456"}
    assert plan(POD | pet | {"PET_NPROC_PER_NODE": "8"}, 8).torchrun == ()
    assert plan(POD | pet | {"PET_NPROC_PER_NODE": "auto"}, 4).torchrun == ("--nproc-per-node", "4")
    older = " ".join(plan(POD, 8).torchrun or ())
    assert older == ("--nnodes 8 --node-rank 3 --nproc-per-node 8 --master-addr dense-1b-master-0 --master-port 23456")


def test_torchrun_and_nobody() -> None:
    assert plan(POD | {"LOCAL_RANK": "1"}, 8).torchrun is None
    assert plan(POD | {"LOCAL_RANK": "1"}, 8).environment == {}
    assert plan(SRUN | POD | {"LOCAL_RANK": "1"}, 8).found == "torchrun", "torchrun started by srun is nearer"
    assert plan({}, 0).torchrun == ("--standalone", "--nproc-per-node", "1")


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({name: value for name, value in SRUN.items() if name != "SLURM_JOB_NODELIST"}, "SLURM_JOB_NODELIST"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_NTASKS"}, "SLURM_NTASKS"),
        ({name: value for name, value in POD.items() if name != "MASTER_PORT"}, "MASTER_PORT"),
    ],
)
def test_variables_that_are_there_in_part(env: dict[str, str], missing: str) -> None:
    with pytest.raises(UserError, match=missing):
        plan(env, 8)
