"""What statistics cost: interleaves training steps without them, with them, and with the usual hooks."""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where nothing is installed

from benchmarks.training_ways import compare, measured, run, unmeasured
from sparsecod_mcore.data import DocstringCorpus, LimitedCorpus, preprocess, train_tokenizer
from sparsecod_mcore.train.hooks import TrainingHooks

OFF, MEASURED, HOOKS = "off", "in the residual add", "hooks, .var() and .item()"
RESULTS = Path(__file__).parent / "results"


@contextlib.contextmanager
def kept_hidden_states(hooks: TrainingHooks, model_chunks: list[Any], iteration: int) -> Iterator[None]:
    """The usual way: forward hooks keep every sub-layer's output; after the step come .var() and .item() of each."""
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).detach())

    handles = [
        module.register_forward_hook(keep)
        for chunk in model_chunks
        for layer in chunk.module.decoder.layers
        for module in (layer.self_attention, layer.mlp, layer)
    ]
    yield
    for hidden_SBD in kept:
        hidden_SBD.float().var(dim=-1, correction=0).mean().item()
    for handle in handles:
        handle.remove()


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
        words = ["--config", arguments.config, "--cod-run-dir", folder / "run", "--cod-data", folder / "text"]
        words += ["--cod-tokenizer", folder / "tokenizer.json"]
        ways = {OFF: unmeasured, MEASURED: measured, HOOKS: kept_hidden_states}
        seconds = run(ways, arguments.rounds, words)
        rows = compare(seconds, OFF)
    if arguments.save:
        save(arguments.config, rows)


def save(config: str, rows: dict[str, dict[str, float]]) -> None:
    """Write the result to benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result: dict[str, Any] = {"benchmark": "statistics_overhead", "config": config}
    result["date"] = date.today().isoformat()
    result |= {"device": device, "machine": platform.machine(), "torch": torch.__version__, "ways": rows}
    path = RESULTS / f"statistics_overhead_{Path(config).stem}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
