"""What measuring adds to a residual add: times it against a plain add, and against the same numbers in plain PyTorch.

Each pair takes turns, so that a noisy machine harms both alike. Times are medians with their 20th and 80th percentiles,
ratios are medians of the ratios of neighbouring runs, GB/s count what must move: two reads and a write.
"""

import argparse
import platform
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor

from sparsecod_mcore.ops import NUM_MOMENTS, residual_add_moments, residual_add_moments_reference

SHAPES = [(256, 128), (1024, 128), (4096, 128), (256, 192), (1024, 192), (4096, 192), (4096, 1024), (2048, 4096)]
DTYPES = (torch.bfloat16, torch.float32)


def time_pair(first: Callable[[], Tensor], second: Callable[[], Tensor], seconds: float) -> Tensor:
    """Return seconds per call [round, 2]: for `seconds` and ten rounds at least, after one that warms up."""
    rounds: list[list[float]] = []
    until = time.perf_counter() + seconds
    while len(rounds) < 11 or time.perf_counter() < until:
        times = []
        for function in (first, second):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        rounds.append(times)
    return torch.tensor(rounds[1:], dtype=torch.float64)


def spread(times_R: Tensor) -> str:
    low, median, high = (1e6 * times_R.quantile(q).item() for q in (0.2, 0.5, 0.8))
    return f"{median:9.1f} [{low:.1f}, {high:.1f}]".ljust(32)


def line(shape: tuple[int, int], dtype: torch.dtype, seconds: float) -> str:
    """Time one shape; return its line of the table."""
    branch, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    moments = torch.zeros(NUM_MOMENTS, dtype=torch.float64)

    def plain() -> Tensor:
        return branch + residual

    def measured() -> Tensor:
        return residual_add_moments(branch, residual, moments)

    def composite() -> Tensor:
        return residual_add_moments_reference(branch, residual, moments)

    plain_R, measured_R = time_pair(plain, measured, seconds).T
    measured_again_R, composite_R = time_pair(measured, composite, seconds).T
    overhead = (measured_R / plain_R).median().item()
    speed_up = (composite_R / measured_again_R).median().item()
    gigabytes = 3 * branch.nbytes / measured_R.median().item() / 1e9
    times = "".join(spread(times_R) for times_R in (plain_R, measured_R, composite_R))
    return f"{shape[0]:5} x {shape[1]:<6}{str(dtype)[6:]:10}{times}{overhead:8.2f}{speed_up:8.1f}{gigabytes:8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair (default 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's choice")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, {date.today()}; microseconds: median [20%, 80%]")
    columns = "".join(name.ljust(32) for name in ("plain add", "measured", "composite"))
    print(f"{'shape':14}{'dtype':10}{columns}{'/ plain':>8}{'faster':>8}{'GB/s':>8}")
    for shape in SHAPES:
        for dtype in DTYPES:
            print(line(shape, dtype, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
