"""A sweep as a Slurm array, a run to an element."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.experiments.launch import REPOSITORY
from sparsecod_mcore.experiments.sweep import is_complete
from sparsecod_mcore.experiments.sweep_file import Sweep, Task


def submit(path: Path, sweep: Sweep, tasks: Sequence[Task]) -> None:
    """Write OUT/sweep.sbatch for what is not complete of the sweep at `path`, and hand it to Slurm where there is one.

    Raises `UserError` if Slurm refuses it.
    """
    waiting = [index for index, task in enumerate(tasks) if not is_complete(sweep, task)]
    if not waiting:
        print(f"all {len(tasks)} runs are complete")
        return
    script = sweep.out / "sweep.sbatch"
    make_folder(sweep.out / "slurm")
    write_atomically(script, script_text(path, sweep, waiting).encode())
    if shutil.which("sbatch") is None:
        print(f"{script}: {len(waiting)} runs; there is no sbatch here to submit it with")
        return
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses {script}: {' '.join(done.stderr.split())}")
    print(done.stdout.strip())


def script_text(path: Path, sweep: Sweep, indices: Sequence[int]) -> str:
    """The batch script of an array of the tasks `indices`; restarted elements go on where they were."""
    slurm = sweep.slurm
    limit = "" if slurm.at_once is None else f"%{slurm.at_once}"
    options = {
        "job-name": sweep.out.name,
        "array": ",".join(map(str, indices)) + limit,
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": slurm.gpus_per_node,
        "time": slurm.time,
        "output": f"{sweep.out}/slurm/%A_%a.log",
        **slurm.options,
    }
    command = [sys.executable, str(REPOSITORY / "tools" / "sweep.py"), str(path), "--task"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in options.items()),
        "#SBATCH --requeue",
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        *([slurm.setup] if slurm.setup else []),
        f'exec {shlex.join(command)} "$SLURM_ARRAY_TASK_ID"',
    ]
    return "\n".join(lines) + "\n"
