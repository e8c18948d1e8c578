"""Whole run directories of made-up models: statistics, log, configuration, scores and evaluation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sparsecod_mcore.monitor.parquet import ParquetSink
from sparsecod_mcore.scoring.results import Scores, write_scores
from tests.scoring.example_scores import example_scores

TOKENS_PER_STEP = 4096
LADDER = ("baseline", "deep", "long context", "weight decay", "GQA + MoE")


def write_example_run(
    folder: Path,
    *,
    layers: int = 8,
    steps: int = 60,
    growth: float = 0.35,
    target: int | None = None,
    probes: bool = True,
    scores: bool = True,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Variance grows by exp(`growth`) a layer at the end; probed and measured by dimension at every tenth step."""
    folder.mkdir(parents=True)
    config = {
        "num_layers": layers, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4, "seq_length": 256,
        "weight_decay": 0.0, "train_iters": target or steps, "cod": {"stats_interval": 1},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config | (settings or {})))
    random = np.random.default_rng(layers)
    sink = ParquetSink(folder / "stats", 0, rows_per_part=layers * 9 * steps // 3)
    lines = []
    for step in range(1, steps + 1):
        statistics = _statistics(layers, growth * step / steps, random)
        if step % 10 == 0 or step == 1:
            statistics |= _of_dimensions(layers, probes, random)
        sink.append(step, TOKENS_PER_STEP * step, statistics)
        last = float(statistics["layer_output", "variance"][-1])
        record = {"iteration": step, "tokens": TOKENS_PER_STEP * step, "loss": 6 - 3 * step / steps}
        record |= {"last_layer_variance": last}
        if step % 10 == 0:
            record |= {"seconds_per_step": 0.5, "tokens_per_second": 8192.0, "tflops_per_device": 0.02, "mfu": None}
        lines.append(record)
    lines.append({"iteration": steps, "validation_loss": 3.1, "validation_perplexity": 22.2})
    sink.flush()
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if scores:
        write_scores(folder / "scores", _scores(layers))
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps(_EVALUATION))
    return folder


def write_ladder(folder: Path, *, layers: int = 8, steps: int = 60) -> list[Path]:
    """Five runs as those of the paper's ablation."""
    settings: list[dict[str, Any]] = [
        {},
        {"num_layers": 2 * layers},
        {"num_layers": 2 * layers, "seq_length": 1024},
        {"num_layers": 2 * layers, "seq_length": 1024, "weight_decay": 0.3},
        {"num_layers": 2 * layers, "seq_length": 1024, "weight_decay": 0.3, "num_experts": 8}
        | {"group_query_attention": True, "num_query_groups": 2},
    ]
    return [
        write_example_run(
            folder / name, layers=step.get("num_layers", layers), steps=steps, growth=growth, settings=step
        )
        for name, growth, step in zip(LADDER, (0.4, 0.35, 0.28, 0.2, 0.1), settings, strict=True)
    ]


def _statistics(layers: int, growth: float, random: np.random.Generator) -> dict[tuple[str, str], np.ndarray]:
    noise_L = np.exp(0.05 * random.standard_normal(layers))
    bounds_L = np.exp(growth * np.arange(layers + 1)) * 0.5 * np.append(1.0, noise_L.cumprod())
    input_L, output_L = bounds_L[:-1], np.maximum(bounds_L[1:], bounds_L[:-1] * 1.01)
    gain_L = output_L - input_L
    middle_L = input_L + 0.4 * gain_L
    return {
        ("attention", "variance"): 0.3 * gain_L,
        ("after_attention", "variance"): middle_L,
        ("after_attention", "shortcut_variance"): input_L,
        ("after_attention", "covariance"): 0.05 * gain_L,
        ("mlp", "variance"): 0.7 * gain_L,
        ("layer_output", "variance"): output_L,
        ("layer_output", "shortcut_variance"): middle_L,
        ("layer_output", "covariance"): -0.05 * gain_L,
    }


def _of_dimensions(layers: int, probes: bool, random: np.random.Generator) -> dict[tuple[str, str], np.ndarray]:
    found = {("layer_output", "dimension_kurtosis"): 3 + 4 * np.exp(-np.arange(layers)) * random.random(layers)}
    if probes:
        for stream in ("jacobian", "jacobian_attention", "jacobian_mlp"):
            found[stream, "deviation"] = 0.02 + 0.1 * np.exp(-0.3 * np.arange(layers)) * (0.5 + random.random(layers))
            found[stream, "deviation_error"] = np.full(layers, 0.005)
            found[stream, "diagonal"] = np.ones(layers)
    return found


def _scores(layers: int) -> Scores:
    scores = example_scores(layers=layers, width=32)
    assert scores.moments is not None
    kurtosis = {"dimension_kurtosis": [3.5] * layers}
    streams = {name: found | kurtosis for name, found in scores.moments.streams.items()}
    return dataclasses.replace(scores, moments=dataclasses.replace(scores.moments, streams=streams))


_EVALUATION = {
    "schema_version": 1,
    "tasks": {
        "arc_easy": {
            "items": 2376,
            "metric": "acc_norm",
            "metrics": {"acc_norm": {"value": 0.301, "stderr": 0.0094}},
            "random_guess": {"value": 0.25, "stderr": 0.0089},
        }
    },
    "perplexity": {"perplexity": {"value": 21.9, "stderr": 0.4}},
}
