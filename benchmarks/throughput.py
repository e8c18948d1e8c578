"""Tokens/s, TFLOP/s and MFU of a configuration: Megatron's stock spec, and this project's without and with statistics.

    [torchrun ...] benchmarks/throughput.py --config examples/configs/dense_1b.yaml [any flag of training]

All ways share the weights, the optimizer and the data (random tokens) of one run and take turns from step to step.
Each step is collected and, where probed, probes every layer; training does so once per interval.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # where nothing is installed

from benchmarks.measure import machine
from benchmarks.training_ways import Way, compare, measured, run, unmeasured
from sparsecod_mcore.config import read_config
from sparsecod_mcore.errors import command_line
from sparsecod_mcore.train.hardware import peak_flops
from sparsecod_mcore.train.hooks import TrainingHooks
from sparsecod_mcore.train.run_directory import nest

STOCK, OFF, MEASURED, PROBED = "stock Megatron", "statistics off", "statistics", "statistics and probes"
RESULTS = Path(__file__).parent / "results"
# Layers that take turns have no hooks that wait for weights which are still being gathered.
NOT_INTERLEAVED = ("overlap_param_gather", "overlap_param_gather_with_optimizer_step")


class StockLayers:
    """A way that runs the layers of Megatron's own spec, on the same parameters."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}  # tokens and floating-point operations of a step
        self._layers: list[tuple[Any, torch.nn.ModuleList]] = []

    @contextlib.contextmanager
    def __call__(self, hooks: TrainingHooks, model_chunks: list[Any], iteration: int) -> Iterator[None]:
        if not self._layers:
            self._build(hooks, model_chunks)
        ours = [decoder.layers for decoder, _ in self._layers]
        for decoder, theirs in self._layers:
            decoder.layers = theirs
        yield
        for (decoder, _), layers in zip(self._layers, ours, strict=True):
            decoder.layers = layers

    def _build(self, hooks: TrainingHooks, model_chunks: list[Any]) -> None:
        from megatron.core.num_microbatches_calculator import get_current_global_batch_size
        from megatron.core.utils import unwrap_model
        from megatron.training import training

        batch = get_current_global_batch_size()
        flops = training.num_floating_point_operations(hooks.args, batch)
        self.done = {"tokens": batch * hooks.args.seq_length, "flops": flops}
        for chunk in unwrap_model(model_chunks):
            self._layers.append((chunk.decoder, stock_layers(hooks.args, chunk)))


def stock_layers(args: Any, chunk: Any) -> torch.nn.ModuleList:
    """Layers of the spec that Megatron would choose for `args`, on the parameters that `chunk` has."""
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import default_layer_spec

    decoder = chunk.decoder
    spec = default_layer_spec(gpt_config_from_args(args), chunk.vp_stage)
    specs = [spec] * len(decoder.layers) if isinstance(spec, ModuleSpec) else spec.layer_specs
    ours, norm, measured_specs = decoder.layers, decoder.final_layernorm, decoder.submodules.layer_specs
    decoder.submodules.layer_specs = specs
    decoder._build_layers()
    theirs = decoder.layers
    decoder.layers, decoder.final_layernorm, decoder.submodules.layer_specs = ours, norm, measured_specs
    share_parameters(ours, theirs)
    return theirs


def share_parameters(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Put the parameters of `ours` into `theirs`, which has the same by name."""
    found = dict(ours.named_parameters())
    names = [name for name, _ in theirs.named_parameters()]
    assert sorted(found) == sorted(names), sorted(found.keys() ^ set(names))
    for name in names:
        owner, _, attribute = name.rpartition(".")
        theirs.get_submodule(owner)._parameters[attribute] = found[name]


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("examples/configs/micro.yaml"))
    parser.add_argument("--rounds", type=int, default=20, help="of four steps each, 2 or more (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="size (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/")
    arguments, flags = parser.parse_known_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    stock = StockLayers()
    ways: dict[str, Way] = {STOCK: stock, OFF: unmeasured, MEASURED: measured}
    ways[PROBED] = partial(measured, probed=True)
    with tempfile.TemporaryDirectory() as name:
        config = {key: value for key, value in read_config(arguments.config).items() if key not in NOT_INTERLEAVED}
        path = Path(name) / arguments.config.name
        path.write_text(yaml.safe_dump(nest(config)))
        words = ["--config", path, "--cod-run-dir", Path(name) / "run", "--mock-data", "--cod-jacobian-interval", 1]
        words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", arguments.vocabulary, *flags]
        seconds = run(ways, arguments.rounds, words)
    if int(os.environ.get("RANK", "0")) == 0:
        rows = rates(compare(seconds, STOCK), stock.done, int(os.environ.get("WORLD_SIZE", "1")))
        report(arguments.config, rows, arguments.save)


def rates(rows: dict[str, dict[str, float]], done: dict[str, float], devices: int) -> dict[str, dict[str, Any]]:
    """Add tokens/s of all devices, and TFLOP/s and MFU of one (None where its peak is unknown), to each row."""
    peak = peak_flops()
    for row in rows.values():
        flops = done["flops"] / row["seconds"] / devices
        row |= {"tokens_per_second": done["tokens"] / row["seconds"], "tflops_per_device": flops / 1e12}
        row["mfu"] = None if peak is None else flops / peak  # type: ignore[assignment]
    return rows


def report(config: Path, rows: dict[str, dict[str, Any]], save: bool) -> None:
    """Print rates by way, and keep them if asked to."""
    for way, row in rows.items():
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        speed = f"{row['tokens_per_second']:12,.0f} tokens/s  {row['tflops_per_device']:8.3g} TFLOP/s"
        print(f"{way:28} {speed}  MFU {mfu}")
    if save:
        result = {"benchmark": "throughput", "config": str(config), "devices": int(os.environ.get("WORLD_SIZE", "1"))}
        result |= machine("cuda" if torch.cuda.is_available() else "cpu") | {"ways": rows}
        path = RESULTS / f"throughput_{config.stem}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
