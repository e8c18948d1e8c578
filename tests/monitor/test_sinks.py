"""What is shown live."""

from typing import Any

import torch

from sparsecod_mcore.monitor.sinks import WandbSink, live_scalars
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


def test_what_is_measured_between_records_waits_for_the_next() -> None:
    logged: list[tuple[dict[str, Any], int]] = []

    class Wandb:
        def log(self, scalars: dict[str, Any], step: int) -> None:
            logged.append((scalars, step))

    sink = WandbSink(Wandb(), log_interval=4)
    sink.append(3, 300, VARIANCES | JACOBIANS)
    sink.append(4, 400, {key: 2 * value for key, value in VARIANCES.items()})
    sink.append(8, 800, VARIANCES)
    (first, step), (second, _) = logged
    assert step == 4 and first["tokens"] == 400
    assert first["variance/last_layer"] == 4.0 and first["jacobian/deviation/layer_001"] == 0.5
    assert "jacobian/deviation/layer_001" not in second
