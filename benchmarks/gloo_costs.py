"""What collectives take on this machine: a job that times gloo's, under torchrun by benchmarks/communication.py.

    torchrun ... benchmarks/gloo_costs.py OUT

For each operation, with all ranks in one group and, of four, with two pairs at once: seconds at a few sizes, from which
`Line` makes latency and seconds a byte.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZES = (64, 4096, 65536, 262144, 1 << 20, 4 << 20)  # bytes of the whole buffer
ROUNDS = 15


@dataclass(frozen=True)
class Line:
    """Seconds of a call: latency + bytes / bandwidth."""

    latency: float
    per_byte: float

    @staticmethod
    def through(sizes: Sequence[int], seconds: Sequence[float]) -> "Line":
        """The line with the least relative errors, squared and summed: small sizes matter as much as large ones."""
        weights = 1 / torch.tensor(seconds, dtype=torch.float64)
        columns = torch.tensor([[1.0, size] for size in sizes], dtype=torch.float64) * weights[:, None]
        latency, per_byte = torch.linalg.lstsq(columns, torch.ones(len(sizes), 1, dtype=torch.float64)).solution
        return Line(max(0.0, latency.item()), max(0.0, per_byte.item()))


def calls(size: int, group: dist.ProcessGroup) -> dict[str, Callable[[], Any]]:
    """The operations on a buffer of `size` bytes as a whole."""
    ranks = group.size()
    whole, part = torch.zeros(size, dtype=torch.uint8), torch.zeros(size // ranks, dtype=torch.uint8)
    floats, float_part = torch.zeros(size // 4), torch.zeros(size // 4 // ranks)
    members = dist.get_process_group_ranks(group)
    place = members.index(dist.get_rank())
    peer, other = members[(place + 1) % ranks], members[(place - 1) % ranks]
    received = torch.zeros_like(whole)

    def exchange() -> None:  # each sends to the next, as stages of a pipeline do in its steady state
        for one in (dist.isend(whole, peer, group=group), dist.irecv(received, other, group=group)):
            assert one is not None  # this rank is in the group
            one.wait()

    return {
        "all_reduce": lambda: dist.all_reduce(floats, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(float_part, floats, group=group),
        "all_to_all": lambda: dist.all_to_all_single(received, whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, members[0], group=group),
        "send": exchange,
        "barrier": lambda: dist.barrier(group=group),
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    groups = {world: dist.new_group(list(range(world)))}
    if world == 4:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        groups[2] = pairs[dist.get_rank() // 2]
    found: dict[str, dict[int, list[float]]] = {}
    for ranks, group in groups.items():
        for size in SIZES:
            for operation, call in calls(size, group).items():
                taken = []
                for _ in range(ROUNDS):
                    dist.barrier()
                    began = time.perf_counter()
                    call()
                    taken.append(time.perf_counter() - began)
                found.setdefault(f"{operation} {ranks}", {})[size] = taken[2:]
    medians = {key: [statistics.median(taken) for taken in rows.values()] for key, rows in found.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps({"sizes": SIZES, "seconds": medians}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
