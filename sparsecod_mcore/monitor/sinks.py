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


# Charts of TensorBoard's custom scalars: every layer's curve on one axis. Tags are regular expressions, so that the
# number of layers need not be known.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "Depth": {
        "Last-layer variance": ["Multiline", ["variance/last_layer"]],
        **{
            title: ["Multiline", [rf"{LIVE[key]}/layer_\d+"]]
            for title, key in {
                "Variance of each layer's output": ("layer_output", "variance"),
                "Variance of each attention branch": ("attention", "variance"),
                "Variance of each MLP branch": ("mlp", "variance"),
                "Kurtosis of each layer's output": ("layer_output", "dimension_kurtosis"),
                "Distance of each layer from the identity": ("jacobian", "deviation"),
                "of its attention": ("jacobian_attention", "deviation"),
                "of its MLP": ("jacobian_mlp", "deviation"),
                "at single tokens": ("jacobian", "token_deviation"),
            }.items()
        },
    }
}
# Panels of W&B: a figure against depth, as last measured.
PROFILES = {
    "variance": (("layer_output", "variance"), "Variance by layer"),
    "deviation": (("jacobian", "deviation"), "Distance from the identity by layer"),
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
        writer.add_custom_scalars(LAYOUT)

    def append(self, iteration: int, tokens: int, statistics: LayerStatistics) -> None:
        for tag, value in live_scalars(statistics).items():
            self._writer.add_scalar(tag, value, iteration)

    def flush(self) -> None:
        self._writer.flush()


class WandbSink:
    """A W&B record per log interval; works offline (``WANDB_MODE=offline``) like the run it belongs to.

    W&B drops steps older than the newest it was given, and Megatron has given it every step up to the log interval:
    what was measured since the last record and not again waits for the next. Beside the curves there are panels
    against depth, renewed where the run saves.
    """

    def __init__(self, wandb: Any, log_interval: int) -> None:
        self._wandb = wandb
        self._log_interval = log_interval
        self._latest: dict[str, float] = {}
        self._profiles: LayerStatistics = {}
        self._iteration = 0
        for section in ("variance", "kurtosis", "jacobian"):
            wandb.define_metric(f"{section}/*", step_metric="tokens")

    def append(self, iteration: int, tokens: int, statistics: LayerStatistics) -> None:
        self._latest |= live_scalars(statistics)
        self._profiles |= {key: statistics[key] for key, _ in PROFILES.values() if key in statistics}
        self._iteration = iteration
        if iteration % self._log_interval == 0:
            self._wandb.log({"tokens": tokens, **self._latest}, iteration)
            self._latest = {}

    def flush(self) -> None:
        """Renew the panels against depth; W&B uploads on its own."""
        panels = {}
        for name, (key, title) in PROFILES.items():
            if key in self._profiles:
                rows = [[layer, value] for layer, value in enumerate(self._profiles.pop(key).tolist())]
                panels[f"by_layer/{name}"] = title, ["layer", name], rows
        if panels:
            self._wandb.log_lines(panels, self._iteration)
