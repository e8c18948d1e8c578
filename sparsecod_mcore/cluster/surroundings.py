"""What a scheduler says of a job's processes, in environment variables: Slurm, Kubernetes, torchrun, or none."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsecod_mcore.errors import UserError

# Seconds after which a node that does not come ends the start, and after which torchrun ends a node that has lost the
# first one: more than processes take to notice (--distributed-timeout-minutes, by default 10) and to say so.
JOIN_TIMEOUT, READ_TIMEOUT = 600, 900


@dataclass(frozen=True)
class Plan:
    """How to start: as one rank, with `environment` added, or through torchrun with the arguments `torchrun`."""

    found: str
    environment: dict[str, str] = field(default_factory=dict)
    torchrun: tuple[str, ...] | None = None


def plan(env: Mapping[str, str], devices: int) -> Plan:
    """Read `env`; `devices` are the GPUs that this process sees (0: a CPU, one process a node).

    Raises `UserError` where a scheduler's variables are there in part.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= env.keys():
        return Plan("torchrun")
    if "SLURM_STEP_ID" in env:
        return _slurm(env, devices)
    if "PET_NNODES" in env or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= env.keys():
        return _kubernetes(env, devices)
    return Plan("one node", torchrun=("--standalone", "--nproc-per-node", str(max(1, devices))))


def _slurm(env: Mapping[str, str], devices: int) -> Plan:
    """srun with a task per GPU: every task is a rank. With a task per node of several GPUs: torchrun on each."""
    tasks, nodes = int(_needed(env, "SLURM_NTASKS")), int(_needed(env, "SLURM_NNODES"))
    host = first_host(env.get("SLURM_STEP_NODELIST") or _needed(env, "SLURM_JOB_NODELIST"))
    job = _needed(env, "SLURM_JOB_ID")
    port = 20000 + int(job) % 10000  # two jobs that share a node differ
    if tasks == nodes and devices > 1:
        is_first = env.get("SLURM_NODEID", "0") == "0"
        conf = f"is_host={int(is_first)},join_timeout={JOIN_TIMEOUT},read_timeout={READ_TIMEOUT}"
        arguments = ["--nnodes", str(nodes), "--nproc-per-node", str(devices), "--rdzv-backend", "c10d"]
        arguments += ["--rdzv-id", f"{job}-{env.get('SLURM_RESTART_COUNT', '0')}"]
        return Plan("Slurm", torchrun=(*arguments, "--rdzv-endpoint", f"{host}:{port}", "--rdzv-conf", conf))
    # --gpus-per-task hides all GPUs but one from a task, which then is its first.
    local = "0" if devices == 1 else _needed(env, "SLURM_LOCALID")
    ranks = {"RANK": _needed(env, "SLURM_PROCID"), "LOCAL_RANK": local, "WORLD_SIZE": str(tasks)}
    ranks["LOCAL_WORLD_SIZE"] = str(max(1, tasks // nodes))
    return Plan("Slurm", ranks | {"MASTER_ADDR": host, "MASTER_PORT": env.get("MASTER_PORT", str(port))})


def _kubernetes(env: Mapping[str, str], devices: int) -> Plan:
    """The training operator's PyTorchJob: PET_* is torchrun's own vocabulary; older ones count pods in RANK."""
    processes = str(max(1, devices))
    if "PET_NNODES" in env:
        counted = env.get("PET_NPROC_PER_NODE", "auto").isdigit()
        return Plan("Kubernetes", torchrun=() if counted else ("--nproc-per-node", processes))
    address, port = _needed(env, "MASTER_ADDR"), _needed(env, "MASTER_PORT")
    arguments = ("--nnodes", _needed(env, "WORLD_SIZE"), "--node-rank", _needed(env, "RANK"))
    where = ("--master-addr", address, "--master-port", port)
    return Plan("Kubernetes", torchrun=(*arguments, "--nproc-per-node", processes, *where))


def _needed(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise UserError(f"{name} is not set, though other variables of its scheduler are")
    return env[name]


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[003-007,9],login1`` is gpu003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"{nodes!r} is no list of nodes")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])
