"""How long a collective takes: latency plus bytes over bandwidth, as NCCL itself estimates it to choose algorithms.

No number here was measured by this project. Latencies, what protocols and trees keep of the bandwidth, and bandwidths
of NVLink are those of NCCL 2.28.7 (src/graph/tuning.cc, ncclTunerConstantsDefaults and ncclTopoTuneModel;
src/graph/topo.h, SM*_NVLINK_BW); adapters are the line rates of NVIDIA's data sheets of the DGX systems. Reductions
inside switches (SHARP, NVLS), contention between jobs, and switches that are oversubscribed are not in it.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from sparsecod_mcore.experiments.collectives import Collective, Operation
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
class Wire:
    """One of NCCL's protocols: its latencies by algorithm, and the share of the bandwidth that is left for data."""

    share: float
    ring: Latency
    tree: Latency


_LL, _SIMPLE = 0.5, 1.0  # LL sends a flag with every word
_TREE_SHARE = 0.92
_NVLINK = (
    Wire(_LL, Latency(6.6e-6, 0.6e-6, 2.7e-6), Latency(6.8e-6, 0.6e-6, 5e-6)),
    Wire(_SIMPLE, Latency(8.4e-6, 3.4e-6, 14e-6), Latency(8.4e-6, 4e-6, 14e-6)),
)
_PCIE = (
    Wire(_LL, Latency(6.6e-6, 1e-6, 2.7e-6), Latency(6.8e-6, 1e-6, 5e-6)),
    Wire(_SIMPLE, Latency(8.4e-6, 5.7e-6, 14e-6), Latency(8.4e-6, 4e-6, 14e-6)),
)


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
        return min(self._seconds(one.operation, one.payload, one.group, wire) for wire in self.wires)

    def _seconds(self, operation: Operation, payload: float, group: Group, wire: Wire) -> float:
        if operation == "all_reduce":
            return min(self._ring(2, payload, group, wire), self._tree(payload, group, wire))
        if operation in ("all_gather", "reduce_scatter"):
            return self._ring(1, payload, group, wire)
        latency, several = wire.ring, group.nodes > 1
        if operation == "send":
            step, bandwidth = (latency.between, self.between) if several else (latency.in_node, self.in_node)
            return latency.call + step + payload / (bandwidth * wire.share)
        if operation == "broadcast":
            tree = wire.tree
            steps = (group.in_node - 1) * tree.in_node + math.ceil(math.log2(group.nodes)) * tree.between
            return tree.call + steps + payload / (self._bandwidth(group) * wire.share)
        # All to all: with every other rank in turn, which is more latency than NCCL has, whose sends run side by side.
        near, far = group.in_node - 1, group.size - group.in_node
        slowest = max(near / self.in_node, far / self.between) / group.size
        return latency.call + near * latency.in_node + far * latency.between + payload * slowest / wire.share

    def _ring(self, passes: int, payload: float, group: Group, wire: Wire) -> float:
        """A reduction is two passes round the ring, a gather or a scatter one."""
        between = passes * (group.nodes - 1)
        in_node = passes * (group.size - 1) - between
        steps = in_node * wire.ring.in_node + between * wire.ring.between
        sent = passes * (group.size - 1) / group.size * payload
        return wire.ring.call + steps + sent / (self._bandwidth(group) * wire.share)

    def _tree(self, payload: float, group: Group, wire: Wire) -> float:
        """Up and down a tree of nodes, along a chain in each."""
        steps = (group.in_node - 1) * wire.tree.in_node + math.ceil(math.log2(group.nodes)) * wire.tree.between
        return wire.tree.call + 2 * steps + 2 * payload / (self._bandwidth(group) * wire.share * _TREE_SHARE)

    def _bandwidth(self, group: Group) -> float:
        """Of a ring: it leaves a node through the adapters of all its members there."""
        return self.in_node if group.nodes == 1 else min(self.in_node, group.in_node * self.between)


def network_of(gpu: Gpu) -> Network:
    """Nodes as NVIDIA sells them with this GPU. NVLink across nodes (GB200 NVL72) is not modelled."""
    return Network(_IN_NODE[gpu.kind], _BETWEEN_NODES.get(gpu.kind, _NDR), _PCIE if "PCIe" in gpu.kind else _NVLINK)
