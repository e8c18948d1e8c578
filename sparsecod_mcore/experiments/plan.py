"""What one configuration takes: parameters, operations, steps, memory, a layout, GPU-hours."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecod_mcore.config import explicit_settings, with_config
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.experiments.amounts import in_words, seconds_in_words
from sparsecod_mcore.experiments.arguments import planned_arguments
from sparsecod_mcore.experiments.flops import Flops, count_flops
from sparsecod_mcore.experiments.gpus import Gpu, gpu_of
from sparsecod_mcore.experiments.layouts import Layout, layout_of, possible_layouts, suggest_layout, with_layout
from sparsecod_mcore.experiments.memory import Memory, estimate_memory
from sparsecod_mcore.experiments.parameters import Parameters, count_parameters
from sparsecod_mcore.experiments.remarks import remarks_on
from sparsecod_mcore.experiments.scale import Scale, describe_scale, estimate_scale

# Keys that make a layout a given one, that --compare chooses itself, and that tell a given layout.
_SIZES = tuple(f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context", "expert_model"))
_RECOMPUTATION = tuple(
    f"recompute_{name}" for name in ("activations", "granularity", "method", "num_layers", "modules")
)
_CHOSEN = (*_SIZES, "expert_tensor_parallel_size", *_RECOMPUTATION)
_VIRTUAL_STAGES = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
_LAYOUT = (*_CHOSEN, *_VIRTUAL_STAGES, "sequence_parallel", "micro_batch_size")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is planned for; `mfu` is the share of the peak that GPUs are assumed to reach while they compute."""

    gpu: Gpu
    gpus: int
    mfu: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    path: Path
    args: Namespace  # validated, at the layout
    parameters: Parameters
    flops: Flops
    machine: Machine
    layout: Layout
    memory: Memory
    given: bool  # whether the layout was given, not suggested
    layout_flags: tuple[str, ...]  # as given, or as suggested
    scale: Scale | None  # None where communication is not modelled; a remark says why
    remarks: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.args.train_iters * self.args.global_batch_size * self.args.seq_length

    @property
    def gpu_hours(self) -> float:
        """Of computing alone."""
        return self.flops.total / (self.machine.gpu.peak * self.machine.mfu) / 3600


def machine_of(kind: str, gpus: int, mfu: float) -> Machine:
    """Raises `UserError` for what no machine is."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus} is given, 1 or more is accepted")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g} is given, above 0 and up to 1 is accepted")
    return Machine(gpu=gpu_of(kind), gpus=gpus, mfu=mfu)


def make_plan(path: Path, flags: Sequence[str], machine: Machine) -> Plan:
    """Plan the run of a configuration, overridden by Megatron's `flags`, on a machine.

    A parallel size in either gives the layout, micro-batch included; without any, one is suggested and validated.
    Raises `UserError` for what training would refuse, and where nothing fits.
    """
    settings = _settings(path, flags)
    given = any(name in settings for name in _SIZES)
    if given:
        layout_flags = [word for name in _LAYOUT if name in settings for word in _as_flag(name, settings[name])]
        args = planned_arguments(path, flags, gpus=machine.gpus)
    else:
        layout, _ = suggest_layout(planned_arguments(path, flags), machine.gpus, machine.gpu)
        layout_flags = layout.flags
        args = planned_arguments(path, [*flags, *layout_flags], gpus=machine.gpus)
    memory = estimate_memory(args)
    remarks = remarks_on(path, args)
    if memory.total > machine.gpu.memory:
        remarks += (f"does not fit: {memory.total / 1e9:.0f} GB of {machine.gpu.memory / 1e9:.0f} GB",)
    flops, scale = count_flops(args), None
    try:
        scale = estimate_scale(args, machine.gpu, machine.mfu, flops)
    except UserError as error:
        remarks += (str(error),)
    return Plan(
        path=path,
        args=args,
        parameters=count_parameters(args),
        flops=flops,
        machine=machine,
        layout=layout_of(args),
        memory=memory,
        given=given,
        layout_flags=tuple(layout_flags),
        scale=scale,
        remarks=remarks,
    )


def _settings(path: Path, flags: Sequence[str]) -> dict[str, Any]:
    """What the configuration and the flags give, by key."""
    return explicit_settings(with_config(["--config", str(path), *flags]))


def _as_flag(key: str, value: Any) -> Iterator[str]:
    if value is not False:
        yield f"--{key.replace('_', '-')}"
    if not isinstance(value, bool):
        yield from map(str, value if isinstance(value, list) else [value])


@dataclass(frozen=True)
class Candidate:
    layout: Layout
    memory: Memory
    scale: Scale


def fastest_layouts(path: Path, flags: Sequence[str], machine: Machine, count: int) -> list[Candidate]:
    """Up to `count` layouts that fit, those whose steps are modelled to be shortest, in that order.

    Raises `UserError` for what training would refuse, and for what is not modelled.
    """
    if count < 1:
        raise UserError(f"--compare {count} is given, 1 or more is accepted")
    settings = _settings(path, flags)
    given = [name for name in _CHOSEN if name in settings]
    if "micro_batch_size" in explicit_settings(flags):  # configurations have one, whatever the layout
        given.append("micro_batch_size")
    if given:
        raise UserError(f"--compare looks for layouts itself, and --{given[0].replace('_', '-')} is given")
    args = planned_arguments(path, flags)
    found = []
    for layout, memory in possible_layouts(args, machine.gpus, machine.gpu):
        scale = estimate_scale(with_layout(args, layout), machine.gpu, machine.mfu)
        found.append(Candidate(layout, memory, scale))
    return sorted(found, key=lambda candidate: candidate.scale.time.total)[:count]


def describe_candidates(candidates: Sequence[Candidate]) -> str:
    """A line to a layout, shortest step first."""
    lines = ["  fastest of the layouts that fit (modelled):"]
    for one in candidates:
        time = one.scale.time
        lines.append(
            f"    {seconds_in_words(time.total):>8}  {one.scale.mfu:5.1%} MFU  {one.memory.total / 1e9:5.1f} GB  "
            f"bubble {time.bubble / time.total:5.1%}  waits for communication "
            f"{sum(time.exposed.values()) / time.total:5.1%}  {_sizes(one.layout)}"
        )
    return "\n".join(lines)


def _sizes(layout: Layout) -> str:
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "CP": layout.context, "EP": layout.expert, "DP": layout.data}
    recompute = ", full recomputation" if layout.recompute else ""
    return f"{' '.join(f'{name}{size}' for name, size in sizes.items())}, micro-batch {layout.micro_batch}{recompute}"


def describe(plan: Plan) -> str:
    """The plan as text, a line to a subject, with what does not add up at the end."""
    args, count, flops, memory, layout = plan.args, plan.parameters, plan.flops, plan.memory, plan.layout
    parts = {
        "embedding": count.embedding,
        "output layer": count.output,
        "attention": count.attention,
        "MLP": count.mlp,
        "shared experts": count.shared_experts,
        "experts": count.experts,
        "router": count.router,
        "norms": count.norms,
    }
    machine = plan.machine
    lines = [
        f"{plan.path}",
        f"  parameters   {in_words(count.total)}, active {in_words(count.active)}; as published (one embedding): "
        f"{in_words(count.published_total)}, active {in_words(count.published_active)}",
        f"               {', '.join(f'{name} {in_words(number, 3)}' for name, number in parts.items() if number)}",
        f"  FLOPs        {flops.per_token:.3e} per token ({flops.attention_share:.1%} attention at length "
        f"{args.seq_length}), {flops.total:.3e} in all",
        f"  tokens       {in_words(plan.tokens)} in {args.train_iters} steps of {args.global_batch_size} x "
        f"{args.seq_length}",
        f"  layout       {_sizes(layout)} ({'given' if plan.given else 'suggested'}): {' '.join(plan.layout_flags)}",
        f"  memory       {memory.total / 1e9:.1f} GB of {machine.gpu.memory / 1e9:.0f} GB a GPU (weights and optimizer "
        f"{memory.weights_and_optimizer / 1e9:.1f}, activations {memory.activations / 1e9:.1f}; estimated)",
        f"  computing    {plan.gpu_hours:.3g} GPU-hours on {machine.gpu.kind} at {machine.mfu:.0%} MFU, without "
        f"anything waited for: {plan.gpu_hours / machine.gpus:.3g} h on {machine.gpus}",
        *(() if plan.scale is None else describe_scale(plan.scale, args.train_iters)),
        *(f"  ! {remark}" for remark in plan.remarks),
    ]
    return "\n".join(lines)
