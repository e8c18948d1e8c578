"""Where statistics go besides Parquet: TensorBoard and Weights & Biases, through the writers that Megatron opened."""

from typing import Any, Protocol

from sparsecod_mcore.monitor.statistics import STREAMS, LayerStatistics


class Sink(Protocol):
    """Takes the statistics of one iteration; `flush` makes what was taken durable."""

    def append(self, iteration: int, tokens: int, statistics: LayerStatistics) -> None: ...

    def flush(self) -> None: ...


def live_scalars(statistics: LayerStatistics) -> dict[str, float]:
    """Scalars worth a live curve: variance of every layer and stream, the last-layer variance (Eq. 4 of h_L), and where
    it was measured the kurtosis of every layer's output (Eq. 20)."""
    scalars = {
        f"variance/{stream}/layer_{layer:03d}": value
        for stream in STREAMS
        for layer, value in enumerate(statistics[stream, "variance"].tolist())
    }
    scalars["variance/last_layer"] = statistics["layer_output", "variance"][-1].item()
    if ("layer_output", "dimension_kurtosis") in statistics:
        for layer, value in enumerate(statistics["layer_output", "dimension_kurtosis"].tolist()):
            scalars[f"kurtosis/layer_output/layer_{layer:03d}"] = value
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

    W&B drops steps older than the newest it was given, and Megatron has given it every step up to the log interval.
    """

    def __init__(self, wandb: Any, log_interval: int) -> None:
        self._wandb = wandb
        self._log_interval = log_interval

    def append(self, iteration: int, tokens: int, statistics: LayerStatistics) -> None:
        if iteration % self._log_interval == 0:
            self._wandb.log({"tokens": tokens, **live_scalars(statistics)}, iteration)

    def flush(self) -> None:
        """W&B uploads on its own."""
