"""What a plan says of communication: volumes against intercepted calls of real jobs, times against formulas."""

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from sparsecod_mcore import platform

platform.prepare()

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.distributed.param_and_grad_buffer import _compute_default_per_buffer_param_layout  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

from benchmarks.communication import (  # noqa: E402
    BATCH,
    COMMON,
    EXACT,
    JOBS,
    RESULTS,
    Job,
    arguments_of,
    compare_volumes,
    error,
    jobs_of,
    modelled_volume,
    run_job,
)
from benchmarks.gloo_costs import Line  # noqa: E402
from sparsecod_mcore.errors import UserError  # noqa: E402
from sparsecod_mcore.experiments.amounts import bytes_in_words, seconds_in_words  # noqa: E402
from sparsecod_mcore.experiments.arguments import planned_arguments  # noqa: E402
from sparsecod_mcore.experiments.buckets import Padding, fill_buckets  # noqa: E402
from sparsecod_mcore.experiments.collectives import Collective, training_collectives  # noqa: E402
from sparsecod_mcore.experiments.config_files import CONFIGS  # noqa: E402
from sparsecod_mcore.experiments.flops import count_flops  # noqa: E402
from sparsecod_mcore.experiments.gpus import gpu_of  # noqa: E402
from sparsecod_mcore.experiments.groups import Group, groups_of  # noqa: E402
from sparsecod_mcore.experiments.network import network_of  # noqa: E402
from sparsecod_mcore.experiments.parameters import count_parameters  # noqa: E402
from sparsecod_mcore.experiments.plan import describe, fastest_layouts, machine_of, make_plan  # noqa: E402
from sparsecod_mcore.experiments.stages import Stage, stages_of  # noqa: E402
from sparsecod_mcore.experiments.step_time import step_time  # noqa: E402
from tests.distributed.jobs import TINY, TINY_MOE  # noqa: E402
from tests.experiments.meta_models import build_on_meta  # noqa: E402

DENSE, MOE = CONFIGS / "paper" / "dense_1b.yaml", CONFIGS / "paper" / "moe_2b_a400m.yaml"
TENSOR = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PIPELINE = ("--pipeline-model-parallel-size", "2")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "flags"),
    [(2, TENSOR), (2, PIPELINE), (2, ("--use-distributed-optimizer",))],
    ids=["TP2 with sequence parallelism", "PP2", "DP2 with the distributed optimizer"],
)
def test_volumes_are_those_of_real_jobs(processes: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Every call of every rank, training's, the statistics' and the probes', in number and bytes."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    assert_volumes(Job("", config, processes, flags), tmp_path / "job")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        (TINY, ()),
        (TINY, ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "20000")),
        (TINY_MOE + TINY, ("--expert-model-parallel-size", "4")),
    ],
    ids=["dense", "dense in buckets", "experts"],
)
def test_volumes_are_those_of_one_rank_among_4096(model: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Megatron's fake process groups send nothing, and are called as real ones would be."""
    config = tmp_path / "tiny.yaml"
    config.write_text(model)
    flags = (*TENSOR, *PIPELINE, *flags)
    flags += ("--global-batch-size", "2048", "--micro-batch-size", "1", "--use-distributed-optimizer")
    assert_volumes(Job("", config, 4096, flags, fake=True), tmp_path / "job")


def assert_volumes(job: Job, out: Path) -> None:
    rows = compare_volumes(job, COMMON, run_job(job, COMMON, 14, out))
    assert {row["who"] for row in rows} == {"training", "statistics", "probes"}
    assert not [row for row in rows if row["calls"] != pytest.approx(row["modelled_calls"])]
    # Nobody sends rows to an expert among ranks that do not exist.
    rows = [row for row in rows if not (job.fake and row["group"] in ("expert", "expert_tensor"))]
    assert not [row for row in rows if abs(error(row)) > EXACT]


def test_volumes_are_those_that_were_recorded() -> None:
    """Of every job in the committed result; rows reach experts as they are routed, not evenly."""
    recorded = json.loads((RESULTS / "communication_micro.json").read_text())["jobs"]
    for job in (job for job in JOBS if job.name in recorded):
        stages = stages_of(arguments_of(job, [*COMMON, *BATCH]), per_node=job.processes)
        modelled = [modelled_volume(stage) for stage in stages]
        for row in recorded[job.name]["volumes"]:
            said = modelled[row["rank"] * len(stages) // job.processes]
            calls, size = said[row["who"], row["operation"], row["group"]]
            routed = row["operation"] == "all_to_all"
            assert calls == pytest.approx(row["calls"]) and size == pytest.approx(
                row["bytes"], 0.12 if routed else EXACT
            )


def laid_out(path: Path, gpus: int, *flags: str) -> Namespace:
    return planned_arguments(path, flags, gpus=gpus)


def total(stage: Stage, kind: str, operation: str) -> float:
    """Bytes in a step."""
    return sum(
        one.payload * one.calls * (1 if one.in_step else stage.micro_batches)
        for one in training_collectives(stage)
        if (one.kind, one.operation) == (kind, operation)
    )


def test_groups_lie_on_nodes_as_megatron_deals_ranks_out() -> None:
    flags = ["--tensor-model-parallel-size", "4", "--sequence-parallel", "--pipeline-model-parallel-size", "4"]
    groups = groups_of(laid_out(DENSE, 128, *flags, "--context-parallel-size", "2"), per_node=8)
    assert groups.tensor == Group("tensor", 4, 4) and groups.context == Group("context", 2, 2)
    assert groups.data == Group("data", 8, 2) and groups.data.nodes == 4
    assert groups.pipeline == Group("pipeline", 4, 1) and groups.world == Group("world", 128, 8)


@pytest.mark.parametrize(("path", "experts"), [(DENSE, 1), (MOE, 8)], ids=["dense", "experts"])
def test_parameters_of_stages_add_up(path: Path, experts: int) -> None:
    flags = ["--pipeline-model-parallel-size", "4", "--expert-model-parallel-size", str(experts)]
    stages = stages_of(laid_out(path, 32, *flags), per_node=8)
    held = sum(stage.dense_parameters + stage.expert_parameters * experts for stage in stages)
    assert held == count_parameters(stages[0].args).total


def test_sequence_parallelism_sends_as_much_and_gathers_inputs_again() -> None:
    """An all-reduce is a scatter and a gather; backward passes gather the input of column-parallel layers again."""
    flags = ("--tensor-model-parallel-size", "8", "--micro-batch-size", "4")
    (plain,) = stages_of(laid_out(DENSE, 8, *flags), per_node=8)
    (split,) = stages_of(laid_out(DENSE, 8, *flags, "--sequence-parallel"), per_node=8)
    again = (2 * plain.layers + 1) * plain.activation * plain.micro_batches  # and of the output layer
    reduced = total(plain, "tensor", "all_reduce") - 3 * 4 * plain.tokens * plain.micro_batches  # without the loss's
    assert total(split, "tensor", "reduce_scatter") == reduced
    assert total(split, "tensor", "all_gather") == reduced + again


def test_gradients_are_sent_twice_round_and_weights_once() -> None:
    args = laid_out(DENSE, 8)
    (stage,) = stages_of(args, per_node=8)
    parameters = count_parameters(args).total
    # With the distributed optimizer each of 18 buckets is padded, here to a multiple of 128.
    assert 4 * parameters <= total(stage, "data", "reduce_scatter") < 4 * (parameters + 18 * 128)
    assert 2 * parameters <= total(stage, "data", "all_gather") < 2 * (parameters + 18 * 128)
    args.use_distributed_optimizer = False
    assert total(stage, "data", "all_reduce") == 4 * parameters


@pytest.mark.parametrize("optimizer", [True, False], ids=["distributed optimizer", "plain"])
@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("size", [40_000_000, 3_000_000])
def test_buckets_are_megatrons(path: Path, optimizer: bool, size: int) -> None:
    """Of the model that Megatron builds, by its own layout of buffers."""
    args = planned_arguments(path, ["--ddp-bucket-size", str(size)])
    parameters = list(build_on_meta(args).parameters())
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    layout = _compute_default_per_buffer_param_layout(parameters, size)
    if optimizer:
        layout = DistributedOptimizer._compute_per_buffer_param_layout(parameters, size, 8, settings)
    (stage,) = stages_of(args, per_node=8)
    buckets = fill_buckets(list(stage.parameters(0)), size, Padding(8, False) if optimizer else None)
    assert list(buckets) == [end - start for start, end in layout.bucket_indices]


def test_the_bucket_of_the_embedding_hides_behind_nothing() -> None:
    def gradients(*flags: str, stage: int = 0) -> list[Collective]:
        args = laid_out(DENSE, 8, "--tensor-model-parallel-size", "1", *flags)
        sent = training_collectives(stages_of(args, per_node=8)[stage])
        return [one for one in sent if (one.kind, one.operation) == ("data", "reduce_scatter")]

    def buckets(*flags: str, stage: int = 0) -> float:
        return sum(one.calls for one in gradients(*flags, stage=stage))

    (last,) = [one for one in gradients() if one.during is None]
    assert buckets() == 18 and last.calls == 1
    assert last.payload / sum(one.payload * one.calls for one in gradients()) == pytest.approx(0.094, abs=5e-4)
    assert buckets("--ddp-num-buckets", "4") == 4
    assert buckets(*PIPELINE) > 1 and buckets(*PIPELINE, stage=1) == 1
    interleaved = (*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2")
    assert 2 < buckets(*interleaved) < buckets(*PIPELINE) and buckets(*interleaved, stage=1) == 2


def test_virtual_stages_send_beside_computing() -> None:
    interleaved = [*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2", "--micro-batch-size", "1"]
    times = [make_plan(DENSE, flags, machine_of("H100", 8, 0.4)).scale for flags in (PIPELINE, interleaved)]
    plain, hidden = (scale.time for scale in times if scale is not None)
    assert plain.exposed["pipeline"] and not plain.hidden["pipeline"]
    assert hidden.hidden["pipeline"] and not hidden.exposed["pipeline"]


def test_experts_get_rows_and_send_them_back() -> None:
    (stage,) = stages_of(laid_out(MOE, 8, "--expert-model-parallel-size", "8"), per_node=8)
    args = stage.args
    rows = args.global_batch_size * args.seq_length / 8 * args.moe_router_topk * args.num_layers
    gates = 2 * rows * stage.element
    assert total(stage, "expert", "all_to_all") == 4 * rows * args.hidden_size * stage.element + gates


def test_a_ring_passes_keys_on_and_brings_gradients_home() -> None:
    flags = ("--context-parallel-size", "4")
    (stage,) = stages_of(laid_out(DENSE, 8, *flags), per_node=8)
    keys_and_values = 2 * stage.tokens * stage.args.hidden_size * stage.element
    sends = 3 + 2 * 3 + 1  # forward; backward with gradients; and those to where they belong
    assert total(stage, "context", "send") == sends * keys_and_values * stage.layers * stage.micro_batches


H100 = network_of(gpu_of("H100"))


def all_reduce(payload: float, group: Group) -> float:
    one = Collective(kind="data", operation="all_reduce", group=group, payload=payload, calls=1)
    return H100.seconds(one)


def test_large_reductions_take_their_bytes_and_small_ones_their_steps() -> None:
    in_node, rails, spread = Group("", 8, 8), Group("", 64, 8), Group("", 64, 1)
    assert all_reduce(8e9, in_node) == pytest.approx(2 * 7 / 8 * 8e9 / 370.8e9, rel=0.01)
    assert all_reduce(8e9, rails) == pytest.approx(2 * 63 / 64 * 8e9 / 370.8e9, rel=0.02)  # eight adapters to a node
    assert all_reduce(8e9, spread) == pytest.approx(2 * 63 / 64 * 8e9 / 50e9, rel=0.02)
    # Small: down and up a tree of 512 or 2048 nodes of eight, in steps of 5 µs, behind 7 steps of 0.6 µs.
    assert all_reduce(8, Group("", 4096, 8)) == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 9 * 5e-6), rel=1e-4)
    assert all_reduce(8, Group("", 16384, 8)) == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 11 * 5e-6), rel=1e-4)


class Constant:
    """A network on which every call takes a second."""

    def seconds(self, one: Collective) -> float:
        return 1.0


def test_a_step_is_its_pipeline_and_what_nothing_hides() -> None:
    args = laid_out(DENSE, 8, *PIPELINE, "--micro-batch-size", "16")
    flops = count_flops(args)
    stages = stages_of(args, per_node=8)
    number = stages[0].micro_batches
    output = 6 * args.hidden_size * args.padded_vocab_size
    layers, last = (flops.per_token - output) / 2, (flops.per_token + output) / 2
    speed = stages[0].tokens  # floating-point operations a second: seconds are operations a token
    silent = step_time({stage: [] for stage in stages}, flops, Constant(), speed)
    assert silent.total == pytest.approx(number * last + layers) and silent.bubble == pytest.approx(layers)

    group = stages[0].groups.data
    shown = Collective(kind="pipeline", operation="send", group=group, payload=1, calls=2)
    beside = replace(shown, kind="tensor", beside=speed / 4)
    last = Collective(kind="data", operation="reduce_scatter", group=group, payload=1, calls=1, in_step=True)
    others = replace(last, calls=3, during="backward")
    time = step_time({stage: [shown, beside, others, last] for stage in stages}, flops, Constant(), speed)
    # Two calls of a second a micro-batch; of two others a quarter each is hidden; of gradients all but the last piece.
    assert time.exposed == pytest.approx({"pipeline": 2 * number, "tensor": 1.5 * number, "data": 1})
    assert time.hidden == pytest.approx({"pipeline": 0, "tensor": 0.5 * number, "data": 3})
    assert time.bubble == pytest.approx(silent.bubble + 3.5)


def test_a_plan_of_4096_gpus_says_what_is_sent_and_how_long_it_takes() -> None:
    plan = make_plan(
        DENSE,
        ["--global-batch-size", "2048", "--micro-batch-size", "1", *TENSOR, *PIPELINE],
        machine_of("H100", 4096, 0.4),
    )
    text = describe(plan)
    for words in ("vendor's figures", "tensor parallel", "pipeline", "data parallel", "control", "MFU with all that"):
        assert words in text
    assert plan.scale is not None and 0 < plan.scale.mfu < 0.4
    assert "all-reduces over 4096 GPUs" in text


def test_one_gpu_sends_nothing() -> None:
    plan = make_plan(
        DENSE, ["--micro-batch-size", "1", "--tensor-model-parallel-size", "1"], machine_of("H200", 1, 0.4)
    )
    assert plan.scale is not None and not any(plan.scale.stages.values())
    assert plan.scale.mfu == pytest.approx(0.4) and "network" not in describe(plan)


def test_the_fastest_layouts_are_sorted_and_fit() -> None:
    machine = machine_of("H100", 64, 0.4)
    found = fastest_layouts(DENSE, [], machine, 3)
    times = [one.scale.time.total for one in found]
    assert len(found) == 3 and times == sorted(times)
    assert all(one.memory.total < machine.gpu.memory for one in found)


def test_refusals() -> None:
    machine = machine_of("H100", 64, 0.4)
    with pytest.raises(UserError, match="--compare 0 is given, 1 or more is accepted"):
        fastest_layouts(DENSE, [], machine, 0)
    for given in (TENSOR, ("--micro-batch-size", "2"), ("--recompute-activations",)):
        with pytest.raises(UserError, match=f"--compare looks for layouts itself, and {given[0]} is given"):
            fastest_layouts(DENSE, given, machine, 1)
    assert [job.name for job in jobs_of(["DP4", "TP2"])] == ["DP4", "TP2"]
    with pytest.raises(UserError, match=r"--only 'TP3' is given, one of 'TP2', .* is accepted \(did you mean 'TP2'"):
        jobs_of(["TP3"])
    allgather = ["--moe-token-dispatcher-type", "allgather", "--expert-model-parallel-size", "2"]
    plan = make_plan(MOE, allgather, machine)
    assert plan.scale is None and "communication is modelled for alltoall" in plan.remarks[-1]


@pytest.mark.parametrize(
    ("flags", "remark"),
    [
        (["--context-parallel-size", "2", "--cp-comm-type", "a2a"], "cp_comm_type a2a is given; .* for p2p"),
        (["--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"], "use_megatron_fsdp is given; .* not modelled"),
        (["--num-distributed-optimizer-instances", "2"], "num_distributed_optimizer_instances 2 is given; .* for 1"),
        (
            ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"],
            "recompute_method block is given; .* for uniform",
        ),
    ],
)
def test_what_is_not_modelled_is_remarked_on(flags: list[str], remark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)  # as plans before have set it; FSDP refuses it
    plan = make_plan(DENSE, ["--tensor-model-parallel-size", "1", *flags], machine_of("H100", 8, 0.4))
    assert plan.scale is None and re.search(remark, plan.remarks[-1])


def test_lines_go_through_small_and_large() -> None:
    sizes = [64, 4096, 1 << 20]
    line = Line.through(sizes, [1e-4 + 2e-9 * size for size in sizes])
    assert (line.latency, line.per_byte) == pytest.approx((1e-4, 2e-9))


def test_amounts() -> None:
    assert [bytes_in_words(size) for size in (8, 51200, 2.1e6, 7.68e9)] == ["8 B", "51.2 kB", "2.1 MB", "7.68 GB"]
    assert [seconds_in_words(time) for time in (2.5, 0.045, 6.7e-6, 1e-8)] == ["2.5 s", "45 ms", "6.7 µs", "0.01 µs"]
