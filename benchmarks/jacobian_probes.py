"""What Jacobian probes cost: steps with and without them in turn, and a round of probes beside a forward pass.

Everything runs in one process that trains as users do. Steps are timed whole, in random order within each round; then
one round of probes of all layers, of directions shared by all tokens and as training runs it, is timed in turn with the
forward pass of the same microbatch.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.measure import Spread, machine, time_in_turn
from sparsecod_mcore.data import DocstringCorpus, LimitedCorpus, preprocess, train_tokenizer
from sparsecod_mcore.jvp.directions import Noise, place_of_this_rank
from sparsecod_mcore.jvp.layer import probe_branches
from sparsecod_mcore.jvp.probes import probe_layer
from sparsecod_mcore.train import pretrain
from sparsecod_mcore.train.batches import forward_step
from sparsecod_mcore.train.hooks import TrainingHooks
from sparsecod_mcore.train.probing import JacobianProbes

PLAIN, PROBED = "without probes", "with probes"
FORWARD, SHARED, ALL = "forward pass", "round, shared directions", "round, as in training"
WARM_UP_ROUNDS = 3
RESULTS = Path(__file__).parent / "results"


class InterleavedHooks(TrainingHooks):
    """Training as it is, one step in two probed; after `rounds` of both, rounds of probes beside forward passes."""

    rounds: ClassVar[int]
    seconds_beside: ClassVar[float]
    steps: ClassVar[dict[str, list[float]]] = defaultdict(list)
    beside: ClassVar[dict[str, list[float]]] = {}

    def train_step(self, original: Callable[..., Any], *args: Any, iteration: int, **kwargs: Any) -> Any:
        _, data, model, *_ = args
        if self.throughput is None:
            self.open(iteration)
        ways = [PLAIN, PROBED]
        random.Random(iteration // len(ways)).shuffle(ways)
        way = ways[iteration % len(ways)]
        (probes,) = self.monitor.instruments
        began = time.perf_counter()
        if way == PROBED:
            probes.begin_step(probes._interval)  # type: ignore[attr-defined]
        result = original(*args, iteration=iteration, **kwargs)
        probes.end_step()
        if way == PROBED:
            probes.collect()
        self.steps[way].append(time.perf_counter() - began)
        if iteration + 1 == len(ways) * (WARM_UP_ROUNDS + self.rounds):
            assert isinstance(probes, JacobianProbes)
            self.beside.update(time_beside_forward(probes, data, model[0], self.seconds_beside))
        return result


def time_beside_forward(probes: JacobianProbes, data: Any, model: Any, seconds: float) -> dict[str, list[float]]:
    """Seconds of a forward pass of one microbatch with its loss, as in training, and of rounds of probes."""
    batch = next(data[0] if isinstance(data, list) else data)
    inputs: dict[int, tuple[torch.Tensor, Any]] = {}
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output, n=number: inputs.__setitem__(
                n, (kwargs["hidden_states"].detach(), kwargs["rotary_pos_emb"])
            ),
            with_kwargs=True,
        )
        for number, layer in probes._layers.items()
    ]

    def forward() -> None:
        output, loss = forward_step(iter([batch]), model)
        loss(output)

    forward()
    for handle in handles:
        handle.remove()
    probing = probes._probing
    shared_PD = torch.randn(probing.num_probes, inputs[0][0].shape[-1])

    def shared() -> None:
        for number, layer in probes._layers.items():
            hidden_SBD, rotary = inputs[number]
            probe_branches(layer, hidden_SBD, shared_PD, rotary_pos_emb=rotary)

    def as_in_training() -> None:
        for number, layer in probes._layers.items():
            hidden_SBD, rotary = inputs[number]
            noise = Noise(1, 1, number, hidden_SBD.device, hidden_SBD.dtype)
            place = place_of_this_rank(hidden_SBD.shape[0], hidden_SBD.shape[1], False)
            probe_layer(layer, hidden_SBD, rotary, probing, noise, place, probes._sums)

    return time_in_turn({FORWARD: [forward], SHARED: [shared], ALL: [as_in_training]}, "cpu", seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="examples/configs/micro.yaml")
    parser.add_argument("--rounds", type=int, default=60, help="of two steps each")
    parser.add_argument("--seconds", type=float, default=30.0, help="for rounds of probes beside forward passes")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    InterleavedHooks.rounds, InterleavedHooks.seconds_beside = arguments.rounds, arguments.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = LimitedCorpus(DocstringCorpus(), 400)
        train_tokenizer(corpus, folder / "tokenizer.json", 4096)
        preprocess(corpus, folder / "text", folder / "tokenizer.json")
        steps = 2 * (WARM_UP_ROUNDS + arguments.rounds)
        pretrain.TrainingHooks = InterleavedHooks  # type: ignore[misc]
        words = ["--config", arguments.config, "--cod-run-dir", folder / "run", "--cod-data", folder / "text"]
        words += ["--cod-tokenizer", folder / "tokenizer.json", "--train-iters", steps, "--eval-iters", 0]
        words += ["--log-interval", 10, "--save-interval", steps + 1, "--lr-warmup-iters", 10]
        pretrain.main([str(word) for word in words])
    report(arguments.config, arguments.save)


def report(config: str, save: bool) -> None:
    """Print what a probed step takes more, spread over the default interval, and rounds in forward passes."""
    steps = {way: values[WARM_UP_ROUNDS:] for way, values in InterleavedHooks.steps.items()}
    ratios = [a / b for a, b in zip(steps[PROBED], steps[PLAIN], strict=True)]
    spread = Spread.of(ratios)
    overhead = (spread.median - 1) / 100
    print(f"\n{config}: median [20 %, 80 %]")
    plain = statistics.median(steps[PLAIN])
    print(
        f"a probed step: {spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}] times a plain one of {plain:.3f} s"
    )
    print(f"at the default interval of 100 steps: {overhead:+.2%} of training time")
    in_forwards = {}
    for way in (SHARED, ALL):
        pairs = zip(InterleavedHooks.beside[way], InterleavedHooks.beside[FORWARD], strict=True)
        in_forwards[way] = Spread.of([a / b for a, b in pairs])
        found = in_forwards[way]
        print(f"{way}: {found.median:.2f} [{found.low:.2f}, {found.high:.2f}] forward passes of the microbatch")
    if save:
        result: dict[str, Any] = {"benchmark": "jacobian_probes", "config": config, **machine("cpu")}
        result["probed_step"] = {"ratio": vars(spread), "plain_seconds": plain, "overhead_at_interval_100": overhead}
        result["forward_passes"] = {way: vars(found) for way, found in in_forwards.items()}
        path = RESULTS / f"jacobian_probes_{Path(config).stem}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
