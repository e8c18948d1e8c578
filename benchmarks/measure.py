"""How benchmarks time: ways in turn, on rotating inputs, against rates of the machine measured in the same run."""

import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

MIN_ROUNDS = 10
ROUNDS_IN_FLIGHT = 8  # on CUDA, before their times are read
AHEAD_CYCLES = 1_000_000  # that the GPU sleeps, for the host to get ahead of it
CACHES = 3  # rotating inputs take so many times the last cache
CPU_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Spread:
    """Seconds per call: the median, and the 20th and 80th percentile."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Spread":
        times = torch.tensor(seconds, dtype=torch.float64)
        low, median, high = (times.quantile(q).item() for q in (0.2, 0.5, 0.8))
        return Spread(low, median, high)


@dataclass(frozen=True)
class Peaks:
    """What the machine was seen to do: a large copy, bytes read and written, and a large matrix product."""

    bytes_per_second: float
    flops_per_second: float


def cache_bytes(device: str) -> int:
    """Size of the cache that inputs must not stay in between calls."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CPU_CACHE_BYTES


def time_in_turn(
    ways: Mapping[str, Sequence[Callable[[], Any]]], device: str, seconds: float
) -> dict[str, list[float]]:
    """Return seconds per call of each way: one list, index r of each from round r.

    A way is the same call on several inputs, which take turns from round to round. Within a round the ways run one
    after the other in random order, so that whatever disturbs the machine disturbs all alike. The first round, which
    compiles and allocates, is left out.
    """
    for calls in ways.values():
        for call in calls:
            call()
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    clock, at_once = (_cuda_rounds, ROUNDS_IN_FLIGHT) if device == "cuda" else (_cpu_rounds, 1)
    rounds = 0
    until = time.perf_counter() + seconds
    while rounds < MIN_ROUNDS or time.perf_counter() < until:
        plan = []
        for _ in range(at_once):
            random.shuffle(order)
            plan.append({name: ways[name][rounds % len(ways[name])] for name in order})
            rounds += 1
        for taken in clock(plan):
            for name, elapsed in taken.items():
                times[name].append(elapsed)
    return times


def _cpu_rounds(plan: list[dict[str, Callable[[], Any]]]) -> list[dict[str, float]]:
    rounds = []
    for calls in plan:
        taken = {}
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name] = time.perf_counter() - began
        rounds.append(taken)
    return rounds


def _cuda_rounds(plan: list[dict[str, Callable[[], Any]]]) -> list[dict[str, float]]:
    events = []
    for calls in plan:
        torch.cuda._sleep(AHEAD_CYCLES)
        of_round = {}
        for name, call in calls.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            call()
            ended.record()
            of_round[name] = (began, ended)
        events.append(of_round)
    torch.cuda.synchronize()
    return [
        {name: 1e-3 * began.elapsed_time(ended) for name, (began, ended) in of_round.items()} for of_round in events
    ]


def measure_peaks(device: str, seconds: float) -> Peaks:
    """Time a copy far larger than the cache, and a matrix product: bfloat16 on CUDA, float32 on CPU."""
    elements = 4 * cache_bytes(device)
    source = torch.randint(-128, 127, (elements,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    width, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    ways = {"copy": [lambda: target.copy_(source)], "product": [lambda: a @ b]}
    times = {name: Spread.of(taken).median for name, taken in time_in_turn(ways, device, seconds).items()}
    return Peaks(2 * source.nbytes / times["copy"], 2 * width**3 / times["product"])


def machine(device: str) -> dict[str, Any]:
    """What results depend on: device, driver, versions, date."""
    found: dict[str, Any] = {"date": date.today().isoformat(), "machine": platform.machine()}
    found["python"] = platform.python_version()
    for package in ("torch", "triton", "sparsecod_mcore", "jvp-flash-attention", "liger-kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if found["sparsecod_mcore"] is None:  # built in place, not installed
        import sparsecod_mcore

        found["sparsecod_mcore"] = sparsecod_mcore.__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "driver": driver_version()}
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        found |= {"device": f"CPU, {torch.get_num_threads()} threads", "capability": capability}
    return found


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, or None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
