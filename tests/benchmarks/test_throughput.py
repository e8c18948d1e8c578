"""The benchmark of training runs all ways on one model, and Megatron's own layers take the part of this project's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.jobs import TINY

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ways_train_the_same_model(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("lr_warmup_iters: 2", "lr_warmup_iters: 1"))
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, program, "--config", config, "--rounds", "2", "--vocabulary", "512"]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for way in ("stock Megatron", "statistics off", "statistics", "statistics and probes"):
        assert done.stdout.count(f"{way} ") >= 2, done.stdout
    assert "checked 5 rounds" in done.stdout


# Before each step, the loss of the step's first microbatch by both kinds of layers.
PROGRAM = """
import torch
from benchmarks import throughput, training_ways

plain = training_ways.Interleaved.train_step
checked = []

def train_step(self, original, *args, iteration, **kwargs):
    if iteration % 4 == 0:
        model = args[2]
        tokens = torch.arange(64)[None] % 512
        out = []
        stock = self.ways[throughput.STOCK]
        with torch.no_grad():
            for way in (training_ways.unmeasured, stock):
                with way(self, model, iteration + 1):
                    kind = type(model[0].module.decoder.layers[0].self_attn_bda).__name__
                    out.append((kind, model[0](tokens, tokens, None, labels=tokens)))
        assert out[0][0] == "MeasuredResidualAdd" != out[1][0], out
        torch.testing.assert_close(out[0][1], out[1][1], rtol=1e-4, atol=1e-5)
        checked.append(iteration)
    return plain(self, original, *args, iteration=iteration, **kwargs)

training_ways.Interleaved.train_step = train_step
if __name__ == "__main__":
    throughput.main()
    print(f"checked {len(checked)} rounds")
"""
