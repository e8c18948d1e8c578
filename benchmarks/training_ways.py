"""Steps of one real training run, each done in one of several ways: what a way costs, on a noisy machine too.

Every step is timed whole (forward, backward, optimizer, and the collection of what was measured). The order of the ways
is shuffled anew in every round, and ratios are taken within a round, so that whatever disturbs the machine harms all.
"""

import contextlib
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch

from sparsecod_mcore.train import pretrain
from sparsecod_mcore.train.hooks import TrainingHooks

WARM_UP_ROUNDS = 3

type Way = Callable[[TrainingHooks, list[Any], int], AbstractContextManager[None]]


@contextlib.contextmanager
def unmeasured(hooks: TrainingHooks, model_chunks: list[Any], iteration: int) -> Iterator[None]:
    """This project's layers, measuring nothing."""
    yield


@contextlib.contextmanager
def measured(hooks: TrainingHooks, model_chunks: list[Any], iteration: int, probed: bool = False) -> Iterator[None]:
    """With the statistics of every layer and, if `probed`, of its Jacobian."""
    monitor = hooks.monitor
    instruments, monitor.instruments = monitor.instruments, monitor.instruments if probed else ()
    monitor.begin_step(iteration)
    yield
    monitor.end_step(iteration, 0)
    monitor.collect()
    monitor.instruments = instruments


class Interleaved(TrainingHooks):
    """Training as it is, each step in the way whose turn it is."""

    ways: ClassVar[Mapping[str, Way]] = {}
    seconds: ClassVar[dict[str, list[float]]] = defaultdict(list)

    def train_step(self, original: Callable[..., Any], *args: Any, iteration: int, **kwargs: Any) -> Any:
        if self.throughput is None:
            self.open(iteration)
        order = list(self.ways)
        random.Random(iteration // len(order)).shuffle(order)
        way = order[iteration % len(order)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        with self.ways[way](self, args[2], iteration + 1):
            result = original(*args, iteration=iteration, **kwargs)
        torch.cuda.synchronize()
        self.seconds[way].append(time.perf_counter() - began)
        return result


def run(ways: Mapping[str, Way], rounds: int, arguments: Sequence[object]) -> dict[str, list[float]]:
    """Train with `arguments`, and return seconds per step of each way, without those of the rounds to warm up."""
    Interleaved.ways = ways
    Interleaved.seconds.clear()
    pretrain.TrainingHooks = Interleaved  # type: ignore[misc]
    steps = len(ways) * (WARM_UP_ROUNDS + rounds)
    words = [*arguments, "--train-iters", steps, "--eval-iters", 0, "--log-interval", 10, "--save-interval", steps + 1]
    pretrain.main([str(word) for word in words])
    return {way: Interleaved.seconds[way][WARM_UP_ROUNDS:] for way in ways}


def compare(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, float]]:
    """Print and return, by way, the median of the seconds, and of the ratio to `reference` within a round."""
    print(f"\n{len(seconds[reference])} rounds; median [20%, 80%] of the ratio within a round")
    rows = {}
    for way, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds[reference], strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=5) if way != reference else (1.0, 1.0)
        row = {"seconds": statistics.median(taken), "ratio": statistics.median(ratios), "ratio_20": low}
        row |= {"ratio_80": high, "ratio_of_medians": statistics.median(taken) / statistics.median(seconds[reference])}
        rows[way] = row
        print(f"{way:28} {row['seconds']:.4f} s  {row['ratio'] - 1:+7.2%}  [{low - 1:+.2%}, {high - 1:+.2%}]")
    return rows
