"""Where statistics go besides Parquet: TensorBoard and Weights & Biases, through the writers that Megatron opened."""

from typing import Any, Protocol

from sparsecod_mcore.monitor.statistics import STREAMS, LayerStatistics


class Sink(Protocol):
    """Takes the statistics of one iteration; `flush` makes what was taken durable."""

    def append(self, iteration: int, tokens: int, statistics: LayerStatistics) -> None: ...

    def flush(self) -> None: ...


# What is worth a live curve of every layer where it was measured; the tag of its curves.
LIVE: dict[tuple[str, str], str] = {
    **{(stream, "variance"): f"variance/{stream}" for stream in STREAMS},
    ("layer_output", "dimension_kurtosis"): "kurtosis/layer_output",
    ("jacobian", "deviation"): "jacobian/deviation",
    ("jacobian_attention", "deviation"): "jacobian/deviation_attention",
    ("jacobian_mlp", "deviation"): "jacobian/deviation_mlp",
    ("jacobian", "token_deviation"): "jacobian/token_deviation",
}


def live_scalars(statistics: LayerStatistics) -> dict[str, float]:
    """Scalars worth a live curve: those of `LIVE` by layer, and the last-layer variance (Eq. 4 of h_L)."""
    scalars = {
        f"{tag}/layer_{layer:03d}": value
        for key, tag in LIVE.items()
        if key in statistics
        for layer, value in enumerate(statistics[key].tolist())
    }
    if ("layer_output", "variance") in statistics:
        scalars["variance/last_layer"] = statistics["layer_output", "variance"][-1].item()
    return scalars


class TensorBoardSink:
    """Scalars into the event file that Megatron's writer holds."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def append(self, iteration: int, tokens: int, statistics: LayerStatistics) -> None:
        for tag, value in live_scalars(statistics).items():
            self._writer.add_scalar(tag, value, iteration)

    def flush(self) -> None:
        self._writer.flush()


class WandbSink:
    """A W&B record per log interval; works offline (``WANDB_MODE=offline``) like the run it belongs to.

    W&B drops steps older than the newest it was given, and Megatron has given it every step up to the log interval:
    what was measured since the last record and not again waits for the next.
    """

    def __init__(self, wandb: Any, log_interval: int) -> None:
        self._wandb = wandb
        self._log_interval = log_interval
        self._latest: dict[str, float] = {}

    def append(self, iteration: int, tokens: int, statistics: LayerStatistics) -> None:
        self._latest |= live_scalars(statistics)
        if iteration % self._log_interval == 0:
            self._wandb.log({"tokens": tokens, **self._latest}, iteration)
            self._latest = {}

    def flush(self) -> None:
        """W&B uploads on its own."""
