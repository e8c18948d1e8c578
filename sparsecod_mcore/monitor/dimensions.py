"""The Parquet store of what single dimensions of the residual stream do: one file per step that measured them."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsecod_mcore.data.atomic import publish, temporary
from sparsecod_mcore.monitor.columns import DimensionMoments
from sparsecod_mcore.monitor.statistics import SUM_STREAM

SCHEMA = pa.schema(
    {
        "iteration": pa.int64(),
        "tokens": pa.int64(),  # training tokens consumed up to and including the iteration
        "layer": pa.int32(),  # counted from 0 over the whole model
        "stream": pa.dictionary(pa.int32(), pa.string()),
        "dimension": pa.int32(),
        "mean": pa.float64(),
        "variance": pa.float64(),
        "kurtosis": pa.float64(),  # Eq. 19, not excess
    }
)
_NAME = re.compile(r"step-(\d+)\.parquet")


class DimensionSink:
    """Writes ``step-<iteration>.parquet`` files, each there wholly or not at all."""

    def __init__(self, directory: Path, resume_iteration: int) -> None:
        """Open `directory` (made if missing) to go on after `resume_iteration`: later steps are dropped."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if path.suffix == ".tmp" or (match and int(match[1]) > resume_iteration):
                path.unlink()

    def append(self, iteration: int, tokens: int, moments: DimensionMoments) -> None:
        """Write one iteration, after which `tokens` training tokens are consumed."""
        num_layers, num_adds, hidden_size = moments.mean_LAD.shape
        per_layer = num_adds * hidden_size
        num_rows = num_layers * per_layer
        streams = pa.DictionaryArray.from_arrays(
            np.tile(np.repeat(np.arange(num_adds, dtype=np.int32), hidden_size), num_layers),
            [SUM_STREAM[add] for add in range(num_adds)],
        )
        columns = [
            np.full(num_rows, iteration),
            np.full(num_rows, tokens),
            np.repeat(np.arange(num_layers, dtype=np.int32), per_layer),
            streams,
            np.tile(np.arange(hidden_size, dtype=np.int32), num_layers * num_adds),
            *(values.flatten().numpy() for values in (moments.mean_LAD, moments.variance_LAD, moments.kurtosis_LAD)),
        ]
        path = self._directory / f"step-{iteration:09d}.parquet"
        pq.write_table(pa.table(columns, schema=SCHEMA), temporary(path), compression="zstd")
        publish(path)
