"""The model of communication that plans are made with, held against real jobs of one to four processes on this machine.

    benchmarks/communication.py [--volumes] [--save]

Every job trains a small model with gloo. Volume: each call that a process makes to a process group is intercepted, and
calls and bytes are compared, by operation and group and on every rank, with what `experiments.collectives` and
`experiments.measuring` count. Time: seconds of a step beside `experiments.step_time`, with latencies and bandwidths of
gloo that are measured in the same run, on the same number of processes, and the speed of computing that jobs of one
process show. None of this says anything of GPUs: there, volumes are the same, constants are the vendor's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where nothing is installed

from sparsecod_mcore import platform

platform.prepare()  # before anything imports Megatron

from benchmarks.gloo_costs import Line  # noqa: E402
from benchmarks.measure import machine  # noqa: E402
from sparsecod_mcore.errors import UserError, command_line, nearest  # noqa: E402
from sparsecod_mcore.experiments.amounts import bytes_in_words  # noqa: E402
from sparsecod_mcore.experiments.arguments import planned_arguments  # noqa: E402
from sparsecod_mcore.experiments.collectives import Collective, training_collectives  # noqa: E402
from sparsecod_mcore.experiments.flops import count_flops  # noqa: E402
from sparsecod_mcore.experiments.measuring import measuring_collectives  # noqa: E402
from sparsecod_mcore.experiments.stages import Stage, stages_of  # noqa: E402
from sparsecod_mcore.experiments.step_time import stage_flops, step_time  # noqa: E402

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
DENSE, MOE = Path("examples/configs/micro.yaml"), Path("examples/configs/micro_moe.yaml")
# Steps whose calls are counted: the least common multiple of the intervals below, after what happens only once.
FIRST, LAST = 7, 12
BATCH = ("--micro-batch-size", "2", "--global-batch-size", "8")
COMMON = (
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "4095", "--num-workers", "0"),
    *("--log-interval", "2", "--eval-iters", "0", "--save-interval", "100000"),
    *("--cod-kurtosis-interval", "6", "--cod-jacobian-interval", "6"),
)
DISTRIBUTED = ("--use-distributed-optimizer",)
EXPERTS = ("--expert-model-parallel-size", "2")
WHOLE_EXPERTS = ("--expert-tensor-parallel-size", "1")  # gloo cannot gather parts of different sizes


@dataclass(frozen=True)
class Job:
    """A layout. `fake`: its first rank runs, and that of its last pipeline stage, each alone among fake groups."""

    name: str
    config: Path
    processes: int
    flags: tuple[str, ...] = ()
    fake: bool = False


TENSOR, PIPELINE, CONTEXT = (
    ("--tensor-model-parallel-size", "2"),
    ("--pipeline-model-parallel-size", "2"),
    ("--context-parallel-size", "2"),
)
JOBS = (
    Job("TP2", DENSE, 2, TENSOR),
    Job("TP2, sequence parallel", DENSE, 2, (*TENSOR, "--sequence-parallel")),
    Job("CP2", DENSE, 2, CONTEXT),
    Job("PP2", DENSE, 2, PIPELINE),
    Job("DP2", DENSE, 2),
    Job("DP2, distributed optimizer", DENSE, 2, DISTRIBUTED),
    Job("EP2 (with DP2), experts", MOE, 2, EXPERTS),
    Job("DP2, experts, distributed optimizer", MOE, 2, DISTRIBUTED),
    Job("DP4", DENSE, 4),
    Job("DP4, distributed optimizer", DENSE, 4, DISTRIBUTED),
    Job("TP2 x PP2", DENSE, 4, (*TENSOR, *PIPELINE)),
    Job("TP2 x PP2, sequence parallel", DENSE, 4, (*TENSOR, *PIPELINE, "--sequence-parallel")),
    Job("TP2 x EP2, experts, sequence parallel", MOE, 4, (*TENSOR, "--sequence-parallel", *EXPERTS, *WHOLE_EXPERTS)),
)

EXACT = 1e-9  # relative; calls that happen every few steps are averaged

type Key = tuple[str, str, str]  # who (training, statistics, probes), operation, group
type Volume = dict[Key, tuple[float, float]]  # calls and bytes


def run_job(job: Job, flags: Sequence[str], steps: int, out: Path) -> list[dict[str, Any]]:
    """Train with recorded_training.py, and return what each rank left."""
    out.mkdir(parents=True)
    words = ["--config", str(job.config), "--cod-run-dir", str(out / "run"), "--train-iters", str(steps)]
    words += ["--lr-warmup-iters", "1", *flags, *job.flags]
    program = [FOLDER / "recorded_training.py", out, FIRST, LAST, *words]
    if not job.fake:
        launch(program, job.processes)
        return [_record(out, rank) for rank in range(job.processes)]
    stages = arguments_of(job, flags).pipeline_model_parallel_size
    ranks = sorted({0, (stages - 1) * job.processes // stages})  # those in between have no data, and would not start
    for rank in ranks:
        run([sys.executable, *program, "--fake-process-group"], RANK=rank, WORLD_SIZE=job.processes, LOCAL_RANK=0)
    return [_record(out, rank) for rank in ranks]


def _record(out: Path, rank: int) -> dict[str, Any]:
    return json.loads((out / f"rank-{rank}.json").read_text()) | {"rank": rank}


def launch(words: Iterable[object], processes: int) -> None:
    """Run a program under torchrun."""
    run([*TORCHRUN, "--nproc-per-node", processes, *words])


def run(words: Iterable[object], **variables: object) -> None:
    """Run a command, one thread a process; its output is shown if it fails."""
    command = [str(word) for word in words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}\n{done.stdout[-2000:]}")


def measured_volume(record: Mapping[str, Any]) -> Volume:
    """What one rank was seen to send, per step."""
    calls: Counter[Key] = Counter()
    sizes: Counter[Key] = Counter()
    for who, operation, group, size, count in record["calls"]:
        calls[who, operation, group] += count
        sizes[who, operation, group] += count * size
    steps = LAST - FIRST + 1
    return {key: (calls[key] / steps, sizes[key] / steps) for key in calls}


def modelled_volume(stage: Stage) -> Volume:
    """What a rank of `stage` is said to send, per step."""
    found: Volume = {}
    for one in sent_by(stage):
        who = one.kind if one.kind in ("statistics", "probes") else "training"
        calls, size = found.get((who, one.operation, one.group.name), (0.0, 0.0))
        number = one.calls * (1 if one.in_step else stage.micro_batches)
        found[who, one.operation, one.group.name] = (calls + number, size + number * one.payload)
    return found


def sent_by(stage: Stage) -> list[Collective]:
    """As this project's own modules for machines without Transformer Engine do it."""
    return training_collectives(stage, ring=False) + measuring_collectives(stage)


def arguments_of(job: Job, flags: Sequence[str]) -> Namespace:
    """Those that the job itself trains with."""
    return planned_arguments(job.config, [*flags, *job.flags], gpus=job.processes)


def compare_volumes(job: Job, flags: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row to a rank, operation and group: calls and bytes of a step, measured and modelled."""
    stages = stages_of(arguments_of(job, flags), per_node=job.processes)
    rows = []
    for record in records:
        rank = record["rank"]
        stage = stages[rank * len(stages) // job.processes]
        seen, said = measured_volume(record), modelled_volume(stage)
        for key in sorted(seen.keys() | said.keys()):
            calls, size = seen.get(key, (0.0, 0.0))
            modelled_calls, modelled_size = said.get(key, (0.0, 0.0))
            rows.append(
                dict(zip(("who", "operation", "group"), key, strict=True))
                | {"rank": rank, "calls": calls, "modelled_calls": modelled_calls}
                | {"bytes": size, "modelled_bytes": modelled_size}
            )
    return rows


def show_volumes(job: Job, rows: Sequence[Mapping[str, Any]]) -> None:
    """Of each rank whose rows differ from the rank before."""
    print(f"\n{job.name}: per rank and step, measured / modelled")
    shown: list[Mapping[str, Any]] = []
    for rank in sorted({row["rank"] for row in rows}):
        of_rank = [row for row in rows if row["rank"] == rank]
        if [{**row, "rank": 0} for row in of_rank] == shown:
            continue
        shown = [{**row, "rank": 0} for row in of_rank]
        for row in of_rank:
            off = error(row)
            same_calls = abs(row["calls"] - row["modelled_calls"]) < EXACT
            print(
                f"  rank {rank}  {row['who']:10} {row['operation']:14} {row['group']:14}"
                f" {row['calls']:9.4g} / {row['modelled_calls']:<9.4g} calls"
                f" {bytes_in_words(row['bytes'], 5):>10} / {bytes_in_words(row['modelled_bytes'], 5):<10}"
                f" {'exact' if abs(off) < EXACT and same_calls else f'{off:+.2%}'}"
            )


def error(row: Mapping[str, Any]) -> float:
    """Of the modelled bytes, relative to those measured."""
    return row["modelled_bytes"] / row["bytes"] - 1 if row["bytes"] else float(bool(row["modelled_bytes"]))


@dataclass(frozen=True)
class Gloo:
    """Latency and bandwidth of gloo, by operation and number of ranks, as measured."""

    lines: Mapping[tuple[str, int], Line]

    def seconds(self, one: Collective) -> float:
        line = self.lines[one.operation, one.group.size]
        return line.latency + line.per_byte * one.payload


@dataclass(frozen=True)
class Alone:
    """What jobs of one process show of computing."""

    flops_per_second: float
    seconds_in_step: float  # that do not grow with micro-batches: optimizer, logs, statistics
    parameters: float


def measure_gloo(processes: int, folder: Path) -> dict[str, Any]:
    """Seconds of each operation at several sizes, on so many processes."""
    path = folder / f"gloo-{processes}.json"
    launch([FOLDER / "gloo_costs.py", path], processes)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def gloo_of(found: Mapping[str, Any]) -> Gloo:
    """The lines through what was measured."""
    lines = {key: Line.through(found["sizes"], seconds) for key, seconds in found["seconds"].items()}
    return Gloo({(key.rpartition(" ")[0], int(key.rpartition(" ")[2])): line for key, line in lines.items()})


def seconds_of(records: Sequence[Mapping[str, Any]]) -> float:
    """Median of the steps behind those that were counted, without those that probe."""
    steps = [max(taken) for taken in zip(*(record["seconds"] for record in records), strict=True)]
    return statistics.median(taken for step, taken in enumerate(steps, start=1) if step > LAST and step % 6)


def measure_alone(config: Path, flags: Sequence[str], steps: int, folder: Path) -> Alone:
    """From two jobs of one process, one with twice the micro-batches of the other."""
    job = Job("one process", config, 1)
    taken = {}
    for batch in (4, 8):
        of_batch = [*flags, "--global-batch-size", str(batch)]
        taken[batch] = seconds_of(run_job(job, of_batch, steps, folder / f"{config.stem}-{batch}"))
        print(f"one process, {config.stem}, {batch // 2} micro-batches: {taken[batch]:.4f} s a step")
    args = arguments_of(job, flags)
    (stage,) = stages_of(args, per_node=1)
    of_micro_batch = (taken[8] - taken[4]) / 2
    return Alone(
        flops_per_second=stage_flops(stage, count_flops(args)) / of_micro_batch,
        seconds_in_step=max(0.0, taken[4] - 2 * of_micro_batch),
        parameters=stage.dense_parameters + stage.expert_parameters,
    )


@dataclass(frozen=True)
class Times:
    """What steps are modelled from: gloo by number of processes, and computing by configuration."""

    gloo: Mapping[int, Mapping[str, Any]]
    alone: Mapping[Path, Alone]

    @staticmethod
    def measure(jobs: Sequence[Job], flags: Sequence[str], steps: int, folder: Path) -> "Times":
        """For `jobs`, on this machine, now: what else runs on it is in the figures."""
        gloo = {processes: measure_gloo(processes, folder) for processes in sorted({job.processes for job in jobs})}
        configs = dict.fromkeys(job.config for job in jobs)
        return Times(gloo, {config: measure_alone(config, flags, steps, folder) for config in configs})

    def modelled(self, job: Job, flags: Sequence[str]) -> dict[str, float]:
        """Seconds of a step without probes: processes share the cores evenly, and nothing runs beside anything."""
        args = arguments_of(job, [*flags, "--cod-jacobian-interval", "0", "--cod-kurtosis-interval", "0"])
        alone = self.alone[job.config]
        crowd = max(1.0, job.processes / len(os.sched_getaffinity(0)))
        stages = {
            stage: [replace(one, beside=0.0) for one in sent_by(stage)] for stage in stages_of(args, job.processes)
        }
        gloo = gloo_of(self.gloo[job.processes])
        time = step_time(stages, count_flops(args), gloo, alone.flops_per_second / crowd)
        held = max(stage.dense_parameters + stage.expert_parameters for stage in stages)
        fixed = alone.seconds_in_step * crowd * held / alone.parameters
        parts = {"compute": time.compute, "bubble": time.bubble, "communication": sum(time.exposed.values())}
        return {"seconds": time.total + fixed} | parts | {"fixed": fixed}


def jobs_of(names: Sequence[str] | None) -> Sequence[Job]:
    """The jobs of those names; all without names. Raises `UserError` for one that is not known."""
    known = {job.name: job for job in JOBS}
    for name in names or ():
        if name not in known:
            raise UserError(
                f"--only {name!r} is given, one of {', '.join(map(repr, known))} is accepted{nearest(name, known)}"
            )
    return [known[name] for name in names or known]


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=36, help="of a job that is timed (default: %(default)s)")
    parser.add_argument("--volumes", action="store_true", help="count only; time nothing")
    parser.add_argument("--only", nargs="*", metavar="JOB", help="jobs by name (default: all)")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/")
    arguments = parser.parse_args()
    flags = [*COMMON, *BATCH]
    jobs = jobs_of(arguments.only)
    if arguments.only and arguments.save:
        raise UserError("--only and --save are given: what is saved is a result of all jobs")
    results: dict[str, Any] = {"benchmark": "communication", "cores": len(os.sched_getaffinity(0))}
    results |= machine("cpu") | {"jobs": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = None if arguments.volumes else Times.measure(jobs, flags, arguments.steps, folder)
        if times is not None:
            results |= {"gloo": {str(processes): found for processes, found in times.gloo.items()}}
        for number, job in enumerate(jobs):
            steps = LAST + 2 if times is None else arguments.steps
            records = run_job(job, flags, steps, folder / str(number))
            rows = compare_volumes(job, flags, records)
            show_volumes(job, rows)
            results["jobs"][job.name] = {"volumes": rows, "load": os.getloadavg()[0]}
            if times is not None:
                measured, modelled = seconds_of(records), times.modelled(job, flags)
                parts = ", ".join(f"{part} {seconds:.4f}" for part, seconds in modelled.items())
                print(f"  step: measured {measured:.4f} s, modelled {parts}")
                results["jobs"][job.name] |= {"measured_seconds": measured, "modelled": modelled}
            if arguments.save:  # what is done is kept, whatever happens to the rest
                path = RESULTS / "communication_micro.json"
                path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
