"""Times every operator beside plain PyTorch, torch.compile and, where installed, its best public peer.

All ways of a row run in the same process and take turns, on random inputs that rotate through more memory than the
cache holds. Times are medians with their 20th and 80th percentiles; `/ ours` is the median over rounds of a way's time
over ours. GB/s count the bytes that the operator cannot avoid to move and TFLOP/s the products of the visible scores,
whatever a way does instead; the share is of a copy's bandwidth, or a matrix product's rate, measured in the same run.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where nothing is installed

from benchmarks.cases import BENCHMARKS, OURS, Benchmark, Inputs, Shape, Way
from benchmarks.measure import CACHES, Peaks, Spread, cache_bytes, machine, measure_peaks, time_in_turn

RESULTS = Path(__file__).parent / "results"
MAX_SETS = 16  # of inputs


def input_sets(benchmark: Benchmark, shape: Shape, dtype: torch.dtype, device: str) -> list[Inputs]:
    """Make inputs until they no longer fit into the cache together."""
    sets: list[Inputs] = []
    held = 0
    while not sets or (held < CACHES * cache_bytes(device) and len(sets) < MAX_SETS):
        sets.append(benchmark.inputs(shape, dtype, device))
        held += sum(x.nbytes for x in flat(sets[-1]))
    return sets


def flat(inputs: Any) -> Iterator[torch.Tensor]:
    for x in inputs:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from flat(x)


def works(way: Way, inputs: Inputs) -> str | None:
    """Return what a way fails with: a peer may not take the shape, and is then left out, with its reason."""
    try:
        way.call(*way.prepare(*inputs))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def rows_of(
    benchmark: Benchmark, shape: Shape, dtype: torch.dtype, device: str, peaks: Peaks, seconds: float, compiled: bool
) -> Iterator[dict[str, Any]]:
    """Time all ways of one shape; yield one row each."""
    sets = input_sets(benchmark, shape, dtype, device)
    label = {"operator": benchmark.operator, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    torch.compiler.reset()
    ways = benchmark.ways(device, compiled)
    calls: dict[str, list[Callable[[], Any]]] = {}
    for name, way in ways.items():
        problem = None if name == OURS else works(way, sets[0])
        if problem is not None:
            yield {**label, "way": name, "failed": problem}
            continue
        calls[name] = [bound(way.call, way.prepare(*inputs)) for inputs in sets]
    times = time_in_turn(calls, device, seconds)
    peak = peaks.flops_per_second if benchmark.in_flops else peaks.bytes_per_second
    for name, taken in times.items():
        spread = Spread.of(taken)
        rate = benchmark.work(shape, dtype) / spread.median
        ratio = Spread.of([a / b for a, b in zip(taken, times[OURS], strict=True)]).median
        row = {**label, "way": name, "seconds": {"20%": spread.low, "50%": spread.median, "80%": spread.high}}
        yield {
            **row,
            "rounds": len(taken),
            "times_ours": ratio,
            ("tflop_per_s" if benchmark.in_flops else "gb_per_s"): rate / (1e12 if benchmark.in_flops else 1e9),
            "share_of_peak": rate / peak,
        }


def bound(call: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    return lambda: call(*inputs)


def line(row: dict[str, Any]) -> str:
    shape = " x ".join(map(str, row["shape"]))
    head = f"{row['operator']:21}{shape:26}{row['dtype']:10}{row['way']:28}"
    if "failed" in row:
        return f"{head}failed: {row['failed'][:100]}"
    low, median, high = (1e6 * row["seconds"][q] for q in ("20%", "50%", "80%"))
    unit = "TFLOP/s" if "tflop_per_s" in row else "GB/s"
    rate = row.get("tflop_per_s", row.get("gb_per_s"))
    time = f"{median:.1f} [{low:.1f}, {high:.1f}]"
    return f"{head}{time:32}{row['times_ours']:7.2f}{rate:10.2f} {unit:8}{row['share_of_peak']:7.1%}"


def run(device: str, benchmarks: list[Benchmark], seconds: float, compiled: bool) -> dict[str, Any]:
    """Time `benchmarks`, printing a line for each row; return everything."""
    torch.manual_seed(0)
    peaks = measure_peaks(device, seconds)
    result: dict[str, Any] = {"benchmark": "operators", **machine(device)}
    result["copy_gb_per_s"] = peaks.bytes_per_second / 1e9
    result["matmul_tflop_per_s"] = peaks.flops_per_second / 1e12
    print(", ".join(f"{name} {value}" for name, value in result.items() if name != "benchmark"))
    columns = f"{'operator':21}{'shape':26}{'dtype':10}{'way':28}{'microseconds: median [20%, 80%]':32}{'/ ours':>7}"
    print(f"{columns}{'rate':>10}{'':9}{'share':>7}")
    rows: list[dict[str, Any]] = []
    for benchmark in benchmarks:
        on_cuda = device == "cuda"
        for shape in benchmark.cuda_shapes if on_cuda else benchmark.cpu_shapes:
            for dtype in benchmark.cuda_dtypes if on_cuda else benchmark.cpu_dtypes:
                for row in rows_of(benchmark, shape, dtype, device, peaks, seconds, compiled):
                    rows.append(row)
                    print(line(row), flush=True)
    return {**result, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    names = [benchmark.operator for benchmark in BENCHMARKS]
    parser.add_argument("--operator", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row's ways together (default: 1)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes its time")
    parser.add_argument("--threads", type=int, help="on CPU; default: PyTorch's choice")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda was given, but PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = [b for b in BENCHMARKS if arguments.operator is None or b.operator in arguments.operator]
    if not chosen:
        print(f"error: this version has no operator {' '.join(arguments.operator)}", file=sys.stderr)
        return 2
    result = run(arguments.device, chosen, arguments.seconds, not arguments.no_compile)
    paths = [arguments.json] if arguments.json else []
    if arguments.save:
        device = result["device"].split(",")[0].replace(" ", "_")
        paths.append(RESULTS / f"operators_{device}.json")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
