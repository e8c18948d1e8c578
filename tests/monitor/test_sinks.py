"""What is shown live."""

import re
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from sparsecod_mcore.monitor.sinks import LAYOUT, TensorBoardSink, WandbSink, live_scalars
from sparsecod_mcore.monitor.statistics import STREAMS, LayerStatistics

VARIANCES: LayerStatistics = {(stream, "variance"): torch.tensor([1.0, 2.0]) for stream in STREAMS}
JACOBIANS: LayerStatistics = {
    (stream, statistic): torch.tensor([0.25, 0.5])
    for stream in ("jacobian", "jacobian_attention", "jacobian_mlp")
    for statistic in ("deviation", "deviation_error", "token_deviation")
}


def test_scalars_are_of_what_was_measured() -> None:
    assert live_scalars(JACOBIANS) == {
        f"jacobian/{tag}/layer_{layer:03d}": value
        for tag in ("deviation", "deviation_attention", "deviation_mlp", "token_deviation")
        for layer, value in enumerate((0.25, 0.5))
    }
    scalars = live_scalars(VARIANCES)
    assert scalars["variance/last_layer"] == scalars["variance/layer_output/layer_001"] == 2.0
    assert len(scalars) == 1 + 2 * len(STREAMS)


class Wandb:
    """Records what W&B would be given."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.axes: dict[str, str] = {}

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, scalars: dict[str, Any], step: int) -> None:
        self.logged.append((scalars, step))

    def log_lines(self, charts: dict[str, Any], step: int) -> None:
        self.logged.append((charts, step))


def test_what_is_measured_between_records_waits_for_the_next() -> None:
    wandb = Wandb()
    sink = WandbSink(wandb, log_interval=4)
    sink.append(3, 300, VARIANCES | JACOBIANS)
    sink.append(4, 400, {key: 2 * value for key, value in VARIANCES.items()})
    sink.append(8, 800, VARIANCES)
    (first, step), (second, _) = wandb.logged
    assert step == 4 and first["tokens"] == 400
    assert first["variance/last_layer"] == 4.0 and first["jacobian/deviation/layer_001"] == 0.5
    assert "jacobian/deviation/layer_001" not in second
    assert wandb.axes == {name: "tokens" for name in ("variance/*", "kurtosis/*", "jacobian/*")}


def test_panels_against_depth_are_of_the_latest_steps() -> None:
    wandb = Wandb()
    sink = WandbSink(wandb, log_interval=100)
    sink.append(3, 300, VARIANCES | JACOBIANS)
    sink.append(4, 400, {key: 2 * value for key, value in VARIANCES.items()})
    sink.flush()
    sink.flush()  # nothing new
    [(panels, step)] = wandb.logged
    assert step == 4
    assert panels["by_layer/variance"][1:] == (["layer", "variance"], [[0, 2.0], [1, 4.0]])
    assert panels["by_layer/deviation"][1:] == (["layer", "deviation"], [[0, 0.25], [1, 0.5]])


def test_tensorboard_has_a_chart_for_every_kind_of_curve(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = [chart for category in Layout.FromString(content).category for chart in category.chart]
    assert [chart.title for chart in charts] == list(LAYOUT["Depth"])
    patterns = [tag for chart in charts for tag in chart.multiline.tag]
    shown = {tag for tag in live_scalars(VARIANCES | JACOBIANS) if any(re.fullmatch(p, tag) for p in patterns)}
    missing = live_scalars(VARIANCES | JACOBIANS).keys() - shown
    assert missing == {f"variance/after_attention/layer_00{layer}" for layer in (0, 1)}
