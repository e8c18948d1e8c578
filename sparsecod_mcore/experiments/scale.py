"""What a layout costs in communication: bytes of a GPU by kind, seconds of a step, and what measuring is of both."""

from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sparsecod_mcore.experiments.amounts import bytes_in_words, seconds_in_words
from sparsecod_mcore.experiments.collectives import Collective, Kind, training_collectives
from sparsecod_mcore.experiments.flops import Flops, count_flops
from sparsecod_mcore.experiments.gpus import Gpu
from sparsecod_mcore.experiments.measuring import measuring_collectives
from sparsecod_mcore.experiments.network import Network, network_of
from sparsecod_mcore.experiments.stages import Stage, stages_of
from sparsecod_mcore.experiments.step_time import StepTime, step_time

_NAMES: dict[Kind, str] = {
    "tensor": "tensor parallel",
    "context": "context parallel",
    "pipeline": "pipeline",
    "data": "data parallel",
    "expert": "expert parallel",
    "control": "control",
    "statistics": "statistics",
    "probes": "probes",
}


@dataclass(frozen=True)
class Scale:
    """The estimate for one layout."""

    stages: Mapping[Stage, list[Collective]]
    network: Network
    time: StepTime
    mfu: float  # of the whole step, with all that is waited for

    @property
    def busiest(self) -> Stage:
        """The stage whose GPUs send most."""
        return max(self.stages, key=lambda stage: sum(sent(stage, one) for one in self.stages[stage]))


def sent(stage: Stage, one: Collective) -> float:
    """Bytes that leave a GPU of `stage` for all calls of `one` in a step."""
    return one.sent * one.calls * (1 if one.in_step else stage.micro_batches)


def estimate_scale(args: Namespace, gpu: Gpu, efficiency: float, flops: Flops | None = None) -> Scale:
    """Of validated `args` (or `layouts.with_layout`) on GPUs that compute at `efficiency` of their peak.

    Raises `UserError` for what is not modelled.
    """
    flops = count_flops(args) if flops is None else flops
    network = network_of(gpu)
    stages = {
        stage: training_collectives(stage) + measuring_collectives(stage) for stage in stages_of(args, gpu.per_node)
    }
    time = step_time(stages, flops, network, gpu.peak * efficiency)
    per_step = flops.per_token * args.global_batch_size * args.seq_length
    return Scale(stages, network, time, per_step / (args.world_size * gpu.peak * time.total))


def describe_scale(scale: Scale, steps: int) -> list[str]:
    """Lines of a plan: the network that is assumed, what is sent, how long a step takes, what measuring is of it."""
    time, network = scale.time, scale.network
    exposed = {_NAMES[kind]: seconds for kind, seconds in time.exposed.items() if seconds}
    parts = {"compute": time.compute, "pipeline bubble": time.bubble, **exposed}
    hidden = sum(time.hidden.values())
    of = f", pipeline rank {time.slowest.number} the slowest; once a step, rank 0" if len(scale.stages) > 1 else ""
    shown = ", ".join(f"{name} {seconds_in_words(seconds)}" for name, seconds in parts.items() if seconds)
    lines = [
        f"  step         {seconds_in_words(time.total)}: {shown}"
        f"{f'; {seconds_in_words(hidden)} of communication beside computing' if hidden else ''}",
        f"               {scale.mfu:.1%} MFU with all that, {steps * time.total / 3600:.3g} h in all (modelled{of})",
    ]
    if not any(scale.stages.values()):
        return lines
    return [
        f"  network      {network.in_node / 1e9:.0f} GB/s in a node, {network.between / 1e9:.0f} GB/s between nodes, "
        "a GPU and direction (vendor's figures, nothing measured)",
        *_volumes(scale),
        *lines,
        *_measuring(scale),
    ]


def _volumes(scale: Scale) -> Iterator[str]:
    """A line to a kind of communication: what a GPU of the busiest stage sends in a step."""
    stage = scale.busiest
    by_kind: dict[Kind, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for one in scale.stages[stage]:
        row = by_kind[one.kind][one.operation]
        row[0] += sent(stage, one)
        row[1] += one.calls * (1 if one.in_step else stage.micro_batches)
    heading, of = "sent", f" of pipeline rank {stage.number}" if len(scale.stages) > 1 else ""
    for kind, operations in by_kind.items():
        total = sum(size for size, _ in operations.values())
        details = ", ".join(
            f"{operation.replace('_', '-')} {bytes_in_words(size)} in {calls:,.4g} calls"
            for operation, (size, calls) in operations.items()
        )
        yield f"  {heading:12} {_NAMES[kind]} {bytes_in_words(total)} a GPU{of} and step: {details}"
        heading = ""


def _measuring(scale: Scale) -> Iterator[str]:
    """What one reduction takes, and all of them are of a step."""
    stage = scale.busiest
    ours: tuple[Kind, ...] = ("statistics", "probes")
    taken = {kind: scale.time.exposed.get(kind, 0.0) for kind in ours}
    if not any(taken.values()):
        return
    calls = [
        f"{bytes_in_words(one.payload)} every {1 / one.calls:.4g} steps in "
        f"{seconds_in_words(scale.network.seconds(one))}"
        for one in scale.stages[stage]
        if one.kind in ours and one.group.name == "world"
    ]
    yield f"  measuring    all-reduces over {stage.groups.world.size} GPUs: {'; '.join(calls)}"
    shares = ", ".join(f"{_NAMES[kind]} {seconds / scale.time.total:.2g} of a step" for kind, seconds in taken.items())
    yield f"               in all {shares}"
