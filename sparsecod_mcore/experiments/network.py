"""How long a collective takes: latency plus bytes over bandwidth, simplified from what NCCL chooses algorithms by.

No number here was measured by this project. Latencies, what protocols and trees leave of the bandwidth, and bandwidths
of NVLink are those of NCCL 2.28.7 (src/graph/tuning.cc, ncclTunerConstantsDefaults and ncclTopoTuneModel;
src/graph/topo.h, SM*_NVLINK_BW); adapters are the line rates of NVIDIA's data sheets of the DGX systems. Reductions
inside switches (SHARP, NVLS), what NCCL allows a channel at most, contention between jobs, and switches that are
oversubscribed are not in it; nor, of NCCL's own estimate, its correction of trees by size, its 1.4 for large reductions
on rings, the network's overhead in every step inside a node and adapters' latency, its case of one rank to a node, and
what it limits LL to in sends.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from sparsecod_mcore.experiments.collectives import Collective
from sparsecod_mcore.experiments.gpus import Gpu
from sparsecod_mcore.experiments.groups import Group

# Bytes/s of a GPU in one direction. NVLink: links times what NCCL counts on a link, 12 of 20.0 GB/s (A100), 18 of 20.6
# (H100, H200), 18 of 40.1 (B200, GB200); the H100 PCIe card has a 16-lane PCIe 5.0 slot of 64 GB/s.
_IN_NODE = {"A100": 240e9, "H100 PCIe": 64e9, "H100": 370.8e9, "H200": 370.8e9, "B200": 721.8e9, "GB200": 721.8e9}
# An adapter to each GPU: HDR InfiniBand (200 Gbit/s) in DGX A100, NDR (400 Gbit/s) in DGX H100, H200, B200 and GB200.
_BETWEEN_NODES = {"A100": 25e9}
_NDR = 50e9


@dataclass(frozen=True)
class Latency:
    """Seconds: of a call, and of each step inside a node (NVLink, or PCIe) and between nodes."""

    call: float
    in_node: float
    between: float


@dataclass(frozen=True)
class Way:
    """A protocol of NCCL's on one of its algorithms: its latency, and the share of the bandwidth that data gets."""

    latency: Latency
    share: float


@dataclass(frozen=True)
class Wire:
    """One of NCCL's protocols. `most` is the bandwidth that it reaches at most, in one node, two, and more."""

    ring: Way
    tree: Way
    most: tuple[float, float, float] = (math.inf, math.inf, math.inf)
    sends: bool = True  # whether it is used from one GPU to another


def _low_latency(in_node: float, most: tuple[float, float, float]) -> Wire:
    """LL, which sends a flag with every word."""
    ring, tree = Latency(6.6e-6, in_node, 2.7e-6), Latency(6.8e-6, in_node, 5e-6)
    return Wire(Way(ring, 0.5), Way(tree, 1 / 3.8), most)


_LL128 = Wire(
    Way(Latency(14e-6, 1.9e-6, 4e-6), 0.92), Way(Latency(14e-6, 1.25e-6, 8.5e-6), 0.92 * 120 / 128), sends=False
)
_SIMPLE = Wire(Way(Latency(8.4e-6, 3.4e-6, 14e-6), 1.0), Way(Latency(8.4e-6, 4e-6, 14e-6), 0.92))
_SIMPLE_ON_PCIE = Wire(Way(Latency(8.4e-6, 5.7e-6, 14e-6), 1.0), Way(Latency(8.4e-6, 4e-6, 14e-6), 0.92))
_AMPERE, _HOPPER, _BLACKWELL = (87.7e9, 22.5e9, 19e9), (141e9, 45e9, 35e9), (282e9, 90e9, 70e9)
_MOST = {"A100": _AMPERE, "H100 PCIe": _HOPPER, "H100": _HOPPER, "H200": _HOPPER}


class Cost(Protocol):
    """What a step's time is made from."""

    def seconds(self, one: Collective) -> float:
        """Of one call."""


@dataclass(frozen=True)
class Network:
    """Nodes of one kind of GPU, an adapter to each GPU. Bandwidths in bytes/s of a GPU in one direction."""

    in_node: float
    between: float
    wires: tuple[Wire, ...]

    def seconds(self, one: Collective) -> float:
        """Of one call: the cheapest of NCCL's algorithms and protocols."""
        return min(seconds for wire in self.wires for seconds in self._ways(one, wire))

    def _ways(self, one: Collective, wire: Wire) -> Iterator[float]:
        operation, payload, group = one.operation, one.payload, one.group
        if operation in ("all_reduce", "barrier"):  # a barrier reduces one element
            yield self._ring(2, one, wire)
            steps = 2 * self._down(group, wire.tree.latency)
            yield wire.tree.latency.call + steps + 2 * payload / self._bandwidth(group, wire, wire.tree)
        elif operation in ("all_gather", "reduce_scatter", "broadcast"):
            yield self._ring(1, one, wire)
        elif wire.sends:
            near, far, each = group.in_node - 1, group.size - group.in_node, payload / group.size
            if operation == "send":  # to the farther of the neighbours
                near, far, each = *((0, 1) if group.nodes > 1 else (1, 0)), payload
            yield self._sends(near, far, each, wire)

    def _ring(self, passes: int, one: Collective, wire: Wire) -> float:
        """A reduction is two passes round the ring, a gather, a scatter or a broadcast one."""
        group, latency = one.group, wire.ring.latency
        between = passes * (group.nodes - 1)
        in_node = passes * (group.size - 1) - between
        steps = in_node * latency.in_node + between * latency.between
        return latency.call + steps + one.sent / self._bandwidth(group, wire, wire.ring)

    def _down(self, group: Group, latency: Latency) -> float:
        """Steps of a tree of nodes, and of a chain in each."""
        return (group.in_node - 1) * latency.in_node + math.ceil(math.log2(group.nodes)) * latency.between

    def _sends(self, near: int, far: int, each: float, wire: Wire) -> float:
        """To `near` ranks of the node and `far` others in turn, which is more latency than NCCL has, side by side."""
        latency, share = wire.ring.latency, wire.ring.share
        slowest = max(near / min(self.in_node * share, wire.most[0]), far / min(self.between * share, wire.most[2]))
        return latency.call + near * latency.in_node + far * latency.between + each * slowest

    def _bandwidth(self, group: Group, wire: Wire, way: Way) -> float:
        """Of a ring or tree: it leaves a node through the adapters of all its members there."""
        plain = self.in_node if group.nodes == 1 else min(self.in_node, group.in_node * self.between)
        return min(plain * way.share, wire.most[min(group.nodes, 3) - 1])


def network_of(gpu: Gpu) -> Network:
    """Nodes as NVIDIA sells them with this GPU. NVLink across nodes (GB200 NVL72) is not modelled."""
    most = _MOST.get(gpu.kind, _BLACKWELL)
    wires: tuple[Wire, ...] = (_low_latency(0.6e-6, most), _LL128, _SIMPLE)
    if "PCIe" in gpu.kind:
        wires = (_low_latency(1e-6, most), _SIMPLE_ON_PCIE)
    return Network(_IN_NODE[gpu.kind], _BETWEEN_NODES.get(gpu.kind, _NDR), wires)
