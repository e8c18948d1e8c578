"""What happens when loss or gradients stop being finite: steps are skipped, so many in a row, or the run stops."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from sparsecod_mcore.monitor.statistics import LayerStatistics, first_non_finite


class TrainingDiverged(RuntimeError):
    """Loss or gradients stopped being finite numbers; the message says where it began."""


class Divergence:
    """Judges every step. A step that is skipped leaves weights, optimizer and schedule as they were."""

    def __init__(self, skips_in_a_row: int) -> None:
        """Up to `skips_in_a_row` steps that follow each other may be skipped; 0 stops at the first."""
        self._allowed = skips_in_a_row
        self._skipped_in_a_row = 0
        self.skipping = False  # the running step
        self._guarded: Any = None

    def guard(self, optimizer: Any) -> None:
        """Have `optimizer` find gradients that are not finite before it steps, as a loss scaler would. Idempotent."""
        if self._allowed == 0 or self._guarded is optimizer:
            return
        self._guarded, prepare_grads = optimizer, optimizer.prepare_grads

        def prepare_and_judge() -> bool:
            overflowed: bool = prepare_grads()
            self.skipping = not overflowed and self._may_skip() and not self._all_finite(optimizer.get_grad_norm())
            return overflowed or self.skipping

        optimizer.prepare_grads = prepare_and_judge

    def _may_skip(self) -> bool:
        return self._skipped_in_a_row < self._allowed

    @staticmethod
    def _all_finite(norm: float) -> bool:
        """Whether every rank's norm is finite. Collective: experts' gradients differ between data-parallel ranks."""
        bad = torch.full((1,), float(not math.isfinite(norm)), device=torch.cuda.current_device())
        dist.all_reduce(bad)
        return bad.item() == 0

    def judge(self, loss_dict: Mapping[str, torch.Tensor], grad_norm: float | None, *, overflowed: bool) -> bool:
        """Whether the run may go on after this step. Collective.

        A loss that is not finite makes the norm of the gradients so, on every rank alike. A loss scaler skips steps
        whose gradients overflowed; their loss must be finite all the same.
        """
        if self.skipping:
            self._skipped_in_a_row += 1
            return True
        self._skipped_in_a_row = 0
        if grad_norm is not None and not overflowed:
            return math.isfinite(grad_norm)
        loss = loss_dict.get("lm loss")  # where there is no norm, the last stage must tell
        return self._all_finite(0.0 if loss is None else loss.float().sum().item())

    def skipped(self, iteration: int, statistics: LayerStatistics) -> str:
        """What to say of a step that was skipped."""
        count = f"{self._skipped_in_a_row} of {self._allowed} in a row"
        return f"warning: step {iteration} is skipped ({count}), {_what(iteration, statistics)}"

    def stopped(self, iteration: int, statistics: LayerStatistics) -> TrainingDiverged:
        """The error to stop with."""
        return TrainingDiverged(
            f"{_what(iteration, statistics)}. "
            "Nothing was saved of this step; the same command goes on from the last checkpoint"
        )


def _what(iteration: int, statistics: LayerStatistics) -> str:
    measured = ("layer_output", "non_finite") in statistics  # a step may have been probed only
    where = first_non_finite(statistics) if measured else None
    if where is not None:
        layer, stream, count = where
        place = f"non-finite values first appear in layer {layer}, stream {stream} ({count} of them)"
    elif measured:
        place = "every layer's output is finite, so it began in the output layer, the loss or the backward pass"
    else:
        place = "this step was not measured; cod.stats_interval 1 names the layer"
    return f"loss or gradients are not finite at iteration {iteration}: {place}"
