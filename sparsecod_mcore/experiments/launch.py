"""The commands that train and score one run of a sweep, and running them."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.experiments.sweep_file import Sweep, Task
from sparsecod_mcore.train.run_directory import nest

REPOSITORY = Path(__file__).parents[2]
_PORT = 29500
_LAST_LINES = 5  # of what a failed command printed


class CommandFailed(Exception):
    """A command of a run did not end well; the message is its own sentence, or the last lines that it printed."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def training_command(sweep: Sweep, task: Task, *, on_slurm: bool = False) -> list[str]:
    """Train `task` as its configuration, written to the sweep's folder, says: here, or on the nodes of a Slurm job."""
    folder = sweep.out / "configs"
    make_folder(folder)
    config = folder / f"{task.name}.yaml"
    write_atomically(config, yaml.safe_dump(nest(dict(task.settings)), sort_keys=False).encode())
    program = [str(REPOSITORY / "examples" / "pretrain_cod.py"), "--config", str(config)]
    program += ["--cod-data", str(sweep.data), "--cod-tokenizer", str(sweep.tokenizer)]
    program += ["--cod-run-dir", str(sweep.out / task.name)]
    return [*_launcher(sweep, on_slurm=on_slurm), *program]


def _launcher(sweep: Sweep, *, on_slurm: bool) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if not on_slurm:
        # Without torchrun the exit code tells whose mistake it was.
        return [sys.executable] if sweep.processes == 1 else _alone(torchrun, sweep.processes)
    nodes, gpus = sweep.slurm.nodes, sweep.slurm.gpus_per_node
    if nodes == 1:
        return _alone(torchrun, gpus)
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{socket.gethostname()}:{_PORT}"]
    on_nodes = ["srun", "--nodes", str(nodes), "--ntasks-per-node", "1"]
    return [*on_nodes, *torchrun, "--nnodes", str(nodes), "--nproc-per-node", str(gpus), *place]


def _alone(torchrun: Sequence[str], processes: int) -> list[str]:
    return [*torchrun, "--standalone", "--nproc-per-node", str(processes)]


def scoring_command(sweep: Sweep, task: Task) -> list[str]:
    """Score the layers of `task`'s trained model."""
    assert sweep.score is not None
    run = sweep.out / task.name
    length = sweep.score.length or task.settings["seq_length"]
    arguments = ["--model", str(run), "--data", str(sweep.data), "--out", str(run / "scores")]
    arguments += ["--scores", sweep.score.scores, "--sequences", str(sweep.score.sequences), "--length", str(length)]
    return [sys.executable, str(REPOSITORY / "tools" / "score_layers.py"), *arguments]


def run_command(command: Sequence[str], log: Path, threads: int) -> None:
    """Run a command to its end, its output added to `log`. Raises `CommandFailed` unless it exits with 0."""
    make_folder(log.parent)
    began = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=_environment(threads)).returncode
    if code:
        raise CommandFailed(_complaint(log.read_bytes()[began:].decode(errors="replace")), code)


def _environment(threads: int) -> Mapping[str, str]:
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {"OMP_NUM_THREADS": str(threads)} | os.environ | {"PYTHONPATH": paths}


def _complaint(output: str) -> str:
    sentences = re.findall(r"^error: (.*)$", output, re.MULTILINE)
    return sentences[-1] if sentences else " | ".join(output.strip().splitlines()[-_LAST_LINES:])
