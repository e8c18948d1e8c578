"""Training programs for tests: training as users run it, with one thing done around Megatron's step."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.jobs import PRETRAIN, Data, Job, command, environment

PROGRAM = """
from sparsecod_mcore.train import hooks
from sparsecod_mcore.train.pretrain import main

step = hooks.TrainingHooks.train_step

{around}

def train_step(self, original, forward_step, data_iterator, model, *args, iteration, **kwargs):
    layers = [layer for chunk in model for layer in chunk.module.decoder.layers]
    run = lambda: step(self, original, forward_step, data_iterator, model, *args, iteration=iteration, **kwargs)
    return around(iteration, model, layers, run)

hooks.TrainingHooks.train_step = train_step
if __name__ == "__main__":
    main()
"""


def train_around(around: str, run: Path, config: Path, data: Data, *flags: object, processes: int = 1) -> Job:
    """Train with ``around(iteration, model, layers, run)``, whose source is given, in place of each step."""
    run.mkdir(parents=True, exist_ok=True)
    program = run / "program.py"
    program.write_text(PROGRAM.format(around=around))
    words: Sequence[str] = [
        str(program) if word == PRETRAIN else word for word in command(run, config, data, *flags, processes=processes)
    ]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300, cwd=os.getcwd())
    return Job(run, done.returncode, done.stdout, done.stderr)
