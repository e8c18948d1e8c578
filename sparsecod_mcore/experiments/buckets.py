"""How Megatron cuts gradients and weights into buckets, so that some are sent while others are still computed.

A bucket is closed by the parameter that fills it, against the order of the model: the last one, which is what nothing
is left to hide, holds the embedding. The distributed optimizer pads parameters and buckets, and keeps an embedding
apart that two pipeline stages share (Megatron's distributed/param_and_grad_buffer.py, optimizer/distrib_optimizer.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.optimizer.param_layout import pad_bucket_end, pad_param_start


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model, as one GPU holds it."""

    size: float  # elements
    expert: bool = False
    shared: bool = False  # an embedding that another pipeline stage holds too


@dataclass(frozen=True)
class Padding:
    """What the distributed optimizer of `shards` ranks adds."""

    shards: int
    for_high_bandwidth: bool  # --ddp-pad-buckets-for-high-nccl-busbw


def fill_buckets(parameters: Sequence[Parameter], threshold: float | None, padding: Padding | None) -> Iterator[float]:
    """Elements of each bucket of at least `threshold`, in the order in which a backward pass fills them.

    `parameters` are in the order of the model. Without a threshold all share a bucket; without the distributed
    optimizer there is no `padding`.
    """

    def closed(filled: float) -> float:
        return pad_bucket_end(filled, padding.shards, padding.for_high_bandwidth) if padding else filled

    filled = 0.0
    for parameter in reversed(parameters):
        alone = padding is not None and parameter.shared
        if padding is not None:
            filled = pad_param_start(filled)
        if alone and filled:
            yield closed(filled)
            filled = 0.0
        filled += parameter.size
        if alone or (threshold is not None and filled >= threshold):
            yield closed(filled)
            filled = 0.0
    if filled:
        yield closed(filled)
