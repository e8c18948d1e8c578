"""Stands in for training in tests of sweeps: logs a loss that is lowest at lr 0.02, and counts how often it ran.

pretend_training.py CONFIG RUN_DIR
"""

import json
import sys
from pathlib import Path

import yaml

config = yaml.safe_load(Path(sys.argv[1]).read_text())
run = Path(sys.argv[2])
run.mkdir(parents=True, exist_ok=True)
with (run / "calls").open("a") as calls:
    calls.write("x")
if config["lr"] > 1:
    sys.exit("error: loss or gradients are not finite at iteration 3")
if config.get("seed") == 13:
    print("error: seed 13 is refused", file=sys.stderr)
    sys.exit(2)
loss = 2.0 + abs(config["lr"] - 0.02) + 0.001 * config.get("seed", 0)
records = [
    {"iteration": 10, "tokens": 640, "loss": loss, "last_layer_variance": 3.0},
    {"iteration": 10, "validation_loss": loss, "validation_perplexity": 2.718**loss},
]
(run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
