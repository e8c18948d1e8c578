"""Real training jobs for tests: launch them under torchrun, read what they left."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsecod_mcore.monitor.parquet import read_statistics

REPOSITORY = Path(__file__).parents[2]
PRETRAIN = str(REPOSITORY / "examples" / "pretrain_cod.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

# A model that trains in a blink, with an odd mix of sizes.
TINY = """
num_layers: 4
hidden_size: 64
ffn_hidden_size: 176
num_attention_heads: 4
group_query_attention: true
num_query_groups: 2
seq_length: 64
max_position_embeddings: 64
position_embedding_type: rope
normalization: RMSNorm
norm_epsilon: 1.0e-6
swiglu: true
disable_bias_linear: true
untie_embeddings_and_output_weights: true
attention_dropout: 0.0
hidden_dropout: 0.0
micro_batch_size: 2
global_batch_size: 8
train_iters: 6
lr: 1.0e-3
min_lr: 1.0e-4
lr_decay_style: cosine
lr_warmup_iters: 2
weight_decay: 0.1
adam_beta2: 0.95
clip_grad: 1.0
log_interval: 2
eval_interval: 1000
eval_iters: 1
num_workers: 0
seed: 1234
cod:
  kurtosis_interval: 3
  jacobian_interval: 1
  jacobian_directions: residual
"""
# Goes before TINY, whose last block stays open.
TINY_MOE = """
num_experts: 4
moe_ffn_hidden_size: 64
moe_shared_expert_intermediate_size: 64
moe_router_topk: 2
moe_router_load_balancing_type: aux_loss
moe_aux_loss_coeff: 0.01
moe_z_loss_coeff: 0.001
moe_token_dispatcher_type: alltoall
"""


@dataclass
class Job:
    """What a training job printed and left behind."""

    run: Path
    returncode: int
    output: str
    errors: str

    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "log.jsonl").read_text().splitlines()]

    def losses(self) -> dict[int, float]:
        """Training loss by iteration."""
        return {record["iteration"]: record["loss"] for record in self.records() if "loss" in record}

    def statistics(self) -> "dict[StatisticKey, float]":
        """Every statistic by (iteration, layer, stream, statistic); fails if one occurs twice."""
        return read_unique_statistics(self.run / "stats")

    def dimensions(self, iteration: int) -> pa.Table:
        """Moments of every dimension at one iteration."""
        return pq.read_table(self.run / "dimensions" / f"step-{iteration:09d}.parquet")

    def complaint(self) -> str:
        """The one sentence that the program itself says of an error."""
        sentences = re.findall(r"^error: (.*)$", self.errors, re.MULTILINE)
        assert len(sentences) == 1, self.errors[-3000:]
        return sentences[0]


def read_unique_statistics(directory: Path) -> dict[tuple[int, int, str, str], float]:
    columns = read_statistics(directory).rows.to_pydict()
    keys = list(zip(columns["iteration"], columns["layer"], columns["stream"], columns["statistic"], strict=True))
    assert len(keys) == len(set(keys)), "a statistic occurs twice"
    return dict(zip(keys, columns["value"], strict=True))


def command(run: Path, config: Path, data: "Data", *flags: object, processes: int = 1) -> list[str]:
    """The command line of a training job, for `subprocess`."""
    program = [PRETRAIN] if processes == 1 else ["--nproc-per-node", str(processes), PRETRAIN]
    launcher = [sys.executable] if processes == 1 else TORCHRUN
    arguments = ["--config", config, "--cod-run-dir", run, "--cod-data", data.prefix, "--cod-tokenizer"]
    return [*launcher, *program, *map(str, [*arguments, data.tokenizer, *flags])]


def environment(wandb: str = "") -> dict[str, str]:
    """One thread a process, so that sums inside one do not depend on how many share the machine.

    `wandb` is the folder here of what stands in for W&B.
    """
    hidden = [str(Path(__file__).parent / wandb)] if wandb else []
    paths = os.pathsep.join([*hidden, str(REPOSITORY)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "WANDB_MODE": "offline"}


def train(
    run: Path,
    config: Path,
    data: "Data",
    *flags: object,
    processes: int = 1,
    ok: bool = True,
    wandb: str = "",
) -> Job:
    """Run a training job to its end."""
    done = subprocess.run(
        command(run, config, data, *flags, processes=processes),
        env=environment(wandb),
        capture_output=True,
        text=True,
        timeout=300,
    )
    job = Job(run, done.returncode, done.stdout, done.stderr)
    assert not ok or job.returncode == 0, f"{job.errors[-4000:]}\n{job.output[-2000:]}"
    return job


@dataclass
class Data:
    """An indexed dataset and its tokenizer."""

    prefix: Path
    tokenizer: Path


# Statistics that may pass through zero are compared on the scale of what they are a part of.
SCALE_OF = {
    "covariance": ("variance",),
    "deviation_error": ("deviation",),
    "diagonal_error": ("diagonal",),
    "token_deviation_error": ("token_deviation",),
    **dict.fromkeys(("residual_change", "residual_gain"), ("residual_change", "residual_gain")),
}


type StatisticKey = tuple[int, int, str, str]  # iteration, layer, stream, statistic


def assert_same_statistics(
    job: Job, reference: Job, tolerance: float, wanted: Callable[[StatisticKey], bool] = lambda key: True
) -> None:
    """Every statistic of both that is `wanted`, equal within a relative tolerance."""
    found, expected = ({key: value for key, value in of.statistics().items() if wanted(key)} for of in (job, reference))
    assert found.keys() == expected.keys() and expected
    keys = sorted(expected)
    scale = np.array([max(abs(expected[*key[:3], of]) for of in SCALE_OF.get(key[3], (key[3],))) for key in keys])
    error = np.abs(np.array([found[key] - expected[key] for key in keys]))
    bad = error > tolerance * scale
    assert not bad.any(), [(keys[i], found[keys[i]], expected[keys[i]]) for i in np.flatnonzero(bad)[:5]]


def assert_same_losses(job: Job, reference: Job, tolerance: float) -> None:
    """The loss of every step, equal within a relative tolerance."""
    found, expected = job.losses(), reference.losses()
    assert found.keys() == expected.keys() and expected
    for iteration, loss in expected.items():
        assert abs(found[iteration] - loss) <= tolerance * loss, (iteration, found[iteration], loss)
