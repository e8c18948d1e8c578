"""Start a program of this project wherever a scheduler put this process; the containers' entry point.

    python -m sparsecod_mcore.cluster.launch examples/pretrain_cod.py --config CONFIG ...

Under Slurm (srun), Kubernetes (PyTorchJob) or torchrun the ranks and the rendezvous are those of their variables;
elsewhere one node is used, a process for each GPU. SPARSECOD_PROCESSES_PER_NODE overrides the count of GPUs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from types import FrameType

import psutil

from sparsecod_mcore.cluster import heartbeat
from sparsecod_mcore.cluster.surroundings import Plan, plan
from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line

PROCESSES = "SPARSECOD_PROCESSES_PER_NODE"


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, as JSON, and end")
    parser.add_argument("program", metavar="PROGRAM", help="a Python program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    given = parser.parse_args()
    found = plan(os.environ, _devices())
    command = command_of(found, [given.program, *given.arguments])
    if given.dry_run:
        print(json.dumps({"found": found.found, "environment": found.environment, "command": command}))
        return
    heartbeat.beat()
    if found.torchrun is None:
        os.execve(command[0], command, {**os.environ, **found.environment})
    sys.exit(supervise(command))


def _devices() -> int:
    if PROCESSES in os.environ:
        return int(os.environ[PROCESSES])
    import torch  # seconds, for a number

    return torch.cuda.device_count()


def command_of(found: Plan, program: list[str]) -> list[str]:
    """The command line of one rank, or of torchrun."""
    launcher = [] if found.torchrun is None else ["-m", "torch.distributed.run", *found.torchrun]
    return [sys.executable, *launcher, *program]


def supervise(command: list[str]) -> int:
    """Run torchrun and return its exit code; hand SIGTERM to its processes, which save and end, and not to it.

    torchrun itself would give them 30 s, less than a large checkpoint takes, and end with an error.
    """
    torchrun = subprocess.Popen(command, start_new_session=True)

    def tell_workers(signum: int, frame: FrameType | None) -> None:
        for worker in psutil.Process(torchrun.pid).children():
            worker.send_signal(signum)

    signal.signal(signal.SIGTERM, tell_workers)
    try:
        return torchrun.wait()
    except KeyboardInterrupt:
        torchrun.send_signal(signal.SIGINT)
        torchrun.wait()
        raise


if __name__ == "__main__":
    main()
