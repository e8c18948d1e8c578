"""What statistics cost: interleaves training steps without them, with them, and with the usual hooks, in one process.

Each step is timed whole (forward, backward, optimizer, and the collection of what was measured). The order of the three
ways is shuffled anew in every round and the ratio taken within the round, so that a noisy machine harms all alike.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import torch

from sparsecod_mcore.data import DocstringCorpus, LimitedCorpus, preprocess, train_tokenizer
from sparsecod_mcore.train import pretrain
from sparsecod_mcore.train.hooks import TrainingHooks

OFF, MEASURED, HOOKS = "off", "in the residual add", "hooks, .var() and .item()"
WARM_UP_ROUNDS = 3
RESULTS = Path(__file__).parent / "results"


class KeptHiddenStates:
    """The usual way: forward hooks keep every sub-layer's output; after the step come .var() and .item() of each."""

    def __init__(self, model_chunks: list[Any]) -> None:
        self.kept: list[torch.Tensor] = []
        self.handles = [
            module.register_forward_hook(self._keep)
            for chunk in model_chunks
            for layer in chunk.module.decoder.layers
            for module in (layer.self_attention, layer.mlp, layer)
        ]

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.kept.append((output[0] if isinstance(output, tuple) else output).detach())

    def finish(self) -> None:
        for hidden_SBD in self.kept:
            hidden_SBD.float().var(dim=-1, correction=0).mean().item()
        for handle in self.handles:
            handle.remove()


class InterleavedHooks(TrainingHooks):
    """Training as it is, one of three ways a step."""

    seconds: ClassVar[dict[str, list[float]]] = defaultdict(list)

    def train_step(self, original: Callable[..., Any], *args: Any, iteration: int, **kwargs: Any) -> Any:
        if self.throughput is None:
            self.open(iteration)
        ways = [OFF, MEASURED, HOOKS]
        random.Random(iteration // len(ways)).shuffle(ways)
        way = ways[iteration % len(ways)]
        began = time.perf_counter()
        usual = KeptHiddenStates(args[2]) if way == HOOKS else None
        if way == MEASURED:
            self.monitor.begin_step(iteration + 1)
        result = original(*args, iteration=iteration, **kwargs)
        self.monitor.end_step(iteration + 1, 0)
        if way == MEASURED:
            self.monitor.collect()
        if usual is not None:
            usual.finish()
        self.seconds[way].append(time.perf_counter() - began)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="examples/configs/micro.yaml")
    parser.add_argument("--rounds", type=int, default=40, help="of three steps each")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = LimitedCorpus(DocstringCorpus(), 400)
        train_tokenizer(corpus, folder / "tokenizer.json", 4096)
        preprocess(corpus, folder / "text", folder / "tokenizer.json")
        steps = 3 * (WARM_UP_ROUNDS + arguments.rounds)
        pretrain.TrainingHooks = InterleavedHooks  # type: ignore[misc]
        words = ["--config", arguments.config, "--cod-run-dir", folder / "run", "--cod-data", folder / "text"]
        words += ["--cod-tokenizer", folder / "tokenizer.json", "--train-iters", steps, "--eval-iters", 0]
        words += ["--log-interval", 10, "--save-interval", steps + 1]
        pretrain.main([str(word) for word in words])
        report(arguments.config, arguments.save)


def report(config: str, save: bool) -> None:
    """Print seconds per step of each way, and their ratio to the step without statistics."""
    seconds = {way: values[WARM_UP_ROUNDS:] for way, values in InterleavedHooks.seconds.items()}
    rows = {}
    print(f"\n{config}, {len(seconds[OFF])} rounds; median [20%, 80%] of the ratio within a round")
    for way in (OFF, MEASURED, HOOKS):
        ratios = [a / b for a, b in zip(seconds[way], seconds[OFF], strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=5) if way != OFF else (1.0, 1.0)
        row = {"seconds": statistics.median(seconds[way]), "ratio": statistics.median(ratios)}
        row |= {"ratio_20": low, "ratio_80": high, "ratio_of_medians": row["seconds"] / statistics.median(seconds[OFF])}
        rows[way] = row
        print(f"{way:28} {row['seconds']:.4f} s  {row['ratio'] - 1:+7.2%}  [{low - 1:+.2%}, {high - 1:+.2%}]")
    if save:
        RESULTS.mkdir(exist_ok=True)
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        result: dict[str, Any] = {"benchmark": "statistics_overhead", "config": config}
        result["date"] = date.today().isoformat()
        result |= {"device": device, "machine": platform.machine(), "torch": torch.__version__, "ways": rows}
        path = RESULTS / f"statistics_overhead_{Path(config).stem}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
