"""Seconds of a training step: computing, waiting for the pipeline, and communication that nothing hides.

Pipeline stages take micro-batches in the 1F1B order: with t_s the seconds of stage s for one forward and backward pass
of a micro-batch, m micro-batches and v virtual stages to a GPU, sum_s t_s / v + (m - 1 / v) max_s t_s (Narayanan et
al. 2021, arXiv:2104.04473, for stages that need not be equal). Computing takes FLOPs / (peak x efficiency), backward
passes two thirds of it; with full recomputation layers are computed once more.

Hidden are only what Megatron runs beside computation: tensor parallel collectives of backward passes beside a gradient
(all of them with tp_comm_overlap), the context parallel ring beside attention, with virtual stages what pipeline stages
send (not with --no-overlap-p2p-communication), and, with overlap_grad_reduce and
overlap_param_gather, gradients beside the last backward pass and weights beside the first forward pass, but for the
bucket that holds the embedding (buckets.py). All else is waited for.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sparsecod_mcore.experiments.collectives import Collective, Kind
from sparsecod_mcore.experiments.flops import Flops
from sparsecod_mcore.experiments.network import Cost
from sparsecod_mcore.experiments.stages import Stage

_BACKWARD, _FORWARD = 2 / 3, 1 / 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on."""

    slowest: Stage
    compute: float  # of the slowest stage
    bubble: float  # in which that stage waits for the pipeline to fill and drain
    exposed: Mapping[Kind, float]  # communication that is waited for: the slowest stage's, and once a step the first's
    hidden: Mapping[Kind, float]  # communication beside computation

    @property
    def total(self) -> float:
        return self.compute + self.bubble + sum(self.exposed.values())


def step_time(
    stages: Mapping[Stage, Iterable[Collective]], flops: Flops, cost: Cost, flops_per_second: float
) -> StepTime:
    """Of stages and all that they send; `flops_per_second` is what a GPU computes at while it computes."""
    passes = {}
    for stage, collectives in stages.items():
        compute = stage_flops(stage, flops) / flops_per_second
        passes[stage] = (compute, *_of_micro_batch(collectives, cost, flops_per_second))
    seconds = {stage: compute + sum(exposed.values()) for stage, (compute, exposed, _) in passes.items()}
    slowest = max(seconds, key=lambda stage: seconds[stage])
    first = next(iter(stages))  # which is the last to have its gradients
    compute, exposed, hidden = passes[slowest]
    number = slowest.micro_batches
    bubble = (sum(seconds.values()) - seconds[slowest]) / slowest.chunks
    exposed_in_step, hidden_in_step = _of_step(stages[first], cost, passes[first][0])
    return StepTime(
        slowest=slowest,
        compute=number * compute,
        bubble=bubble,
        exposed=_sum({kind: number * taken for kind, taken in exposed.items()}, exposed_in_step),
        hidden=_sum({kind: number * taken for kind, taken in hidden.items()}, hidden_in_step),
    )


def stage_flops(stage: Stage, flops: Flops) -> float:
    """Of one GPU of a stage for one micro-batch, forward and backward, with what is recomputed."""
    args = stage.args
    output = 6 * args.hidden_size * args.padded_vocab_size
    layers = (flops.per_token - output) * stage.layers / args.num_layers
    recomputed = (3 + stage.forwards - 1) / 3
    per_token = layers * recomputed + (output if stage.last else 0)
    return per_token * stage.tokens / args.tensor_model_parallel_size


def _of_micro_batch(
    collectives: Iterable[Collective], cost: Cost, flops_per_second: float
) -> tuple[dict[Kind, float], dict[Kind, float]]:
    """Seconds waited for, and hidden, by kind."""
    exposed: dict[Kind, float] = defaultdict(float)
    hidden: dict[Kind, float] = defaultdict(float)
    for one in collectives:
        if not one.in_step:
            taken = cost.seconds(one)
            beside = min(taken, one.beside / flops_per_second)
            exposed[one.kind] += one.calls * (taken - beside)
            hidden[one.kind] += one.calls * beside
    return exposed, hidden


def _of_step(
    collectives: Iterable[Collective], cost: Cost, compute: float
) -> tuple[dict[Kind, float], dict[Kind, float]]:
    """Of what is sent once a step; `compute` seconds of a micro-batch may hide gradients and weights."""
    exposed: dict[Kind, float] = defaultdict(float)
    hidden: dict[Kind, float] = defaultdict(float)
    room = {"forward": _FORWARD * compute, "backward": _BACKWARD * compute}  # shared by dense weights and experts
    for one in collectives:
        if not one.in_step:
            continue
        taken = one.calls * cost.seconds(one)
        beside = 0.0
        if one.during is not None:
            beside = min(taken, room[one.during])
            room[one.during] -= beside
        exposed[one.kind] += taken - beside
        hidden[one.kind] += beside
    return exposed, hidden


def _sum(*parts: Mapping[Kind, float]) -> dict[Kind, float]:
    total: dict[Kind, float] = defaultdict(float)
    for part in parts:
        for kind, seconds in part.items():
            total[kind] += seconds
    return dict(total)
