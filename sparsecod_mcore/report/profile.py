"""A profile that can be read at a glance: which kernels take the time, and how much of it the statistics take."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

# Operators of this project, and the kernels that they launch, are in namespaces of that name.
OURS = "sparsecod"
SHOWN = 15
NAME_WIDTH = 72


@dataclass(frozen=True)
class Kernel:
    """A kernel or operator: the time it took in all, in milliseconds, and how often it ran."""

    name: str
    milliseconds: float
    calls: int


def read_nsys_kernels(text: str) -> list[Kernel]:
    """Read ``nsys stats --report cuda_gpu_kern_sum --format csv``, which may talk before its table."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith("Time (%)")), len(lines))
    rows = csv.DictReader(io.StringIO("\n".join(lines[header:])))
    return [Kernel(row["Name"], float(row["Total Time (ns)"]) / 1e6, int(row["Instances"])) for row in rows]


def statistics_share(kernels: Sequence[Kernel]) -> float:
    """The part of the time that this project's kernels take, of 1."""
    whole = sum(kernel.milliseconds for kernel in kernels)
    ours = sum(kernel.milliseconds for kernel in kernels if OURS in kernel.name)
    return ours / whole if whole else 0.0


def profile_table(kernels: Sequence[Kernel]) -> str:
    """The kernels that take most of the time, longest first, and the share of the statistics."""
    whole = sum(kernel.milliseconds for kernel in kernels)
    lines = [f"{'ms':>10} {'share':>6} {'calls':>7}  kernel"]
    for kernel in sorted(kernels, key=lambda kernel: -kernel.milliseconds)[:SHOWN]:
        share = kernel.milliseconds / whole if whole else 0.0
        lines.append(f"{kernel.milliseconds:10.2f} {share:6.1%} {kernel.calls:7}  {kernel.name[:NAME_WIDTH]}")
    lines.append(f"{whole:10.2f} ms in all, {statistics_share(kernels):.1%} of it in this project's statistics")
    return "\n".join(lines)
