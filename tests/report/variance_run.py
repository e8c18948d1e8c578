"""A run directory whose statistics are known in closed form."""

from pathlib import Path

import numpy as np

from sparsecod_mcore.monitor.parquet import ParquetSink

EMBEDDING_VARIANCE = 0.5
TOKENS_PER_STEP = 4096


def write_run(run_directory: Path, *, num_layers: int, num_iterations: int) -> None:
    """At iteration i, layer l: both branches have variance i/4 and covariance l/100 with the residual."""
    sink = ParquetSink(run_directory / "stats", 0)
    layer_L = np.arange(num_layers)
    for iteration in range(1, num_iterations + 1):
        branch_L = np.full(num_layers, iteration / 4)
        covariance_L = layer_L / 100
        growth_L = branch_L + 2 * covariance_L  # of either add
        after_attention_L = EMBEDDING_VARIANCE + 2 * np.cumsum(growth_L) - growth_L
        sink.append(
            iteration,
            TOKENS_PER_STEP * iteration,
            {
                ("attention", "variance"): branch_L,
                ("after_attention", "variance"): after_attention_L,
                ("after_attention", "shortcut_variance"): after_attention_L - growth_L,
                ("after_attention", "covariance"): covariance_L,
                ("mlp", "variance"): branch_L,
                ("layer_output", "variance"): after_attention_L + growth_L,
                ("layer_output", "shortcut_variance"): after_attention_L,
                ("layer_output", "covariance"): covariance_L,
            },
        )
    sink.flush()
