"""Where this project stands in Megatron's training loop.

Megatron's loop looks its parts up as globals of ``megatron.training.training``; each method of `TrainingHooks` named
like one of them stands around it, called with the original first.
"""

import functools
import math
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_tensorboard_writer, get_wandb_writer, training

from sparsecod_mcore.cluster import heartbeat
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.monitor.dimensions import DimensionSink
from sparsecod_mcore.monitor.monitor import Monitor
from sparsecod_mcore.monitor.parquet import ParquetSink
from sparsecod_mcore.monitor.sinks import Sink, TensorBoardSink, WandbSink
from sparsecod_mcore.monitor.statistics import LayerStatistics
from sparsecod_mcore.train import checkpoints, profiling
from sparsecod_mcore.train.divergence import Divergence
from sparsecod_mcore.train.hardware import peak_flops
from sparsecod_mcore.train.output import Say
from sparsecod_mcore.train.progress import RunLog, Throughput, last_layer_variance, training_line
from sparsecod_mcore.train.run_directory import RunDirectory


class TrainingHooks:
    """One training run's monitor, logs and checkpoint care, hooked into Megatron's loop."""

    def __init__(self, args: Namespace, run: RunDirectory, monitor: Monitor, say: Say) -> None:
        """`say` shows one line to the user."""
        self.args, self.run, self.monitor, self.say = args, run, monitor, say
        # Megatron's loss, TensorBoard and W&B live on the last rank; so do this run's files.
        self.writes = dist.get_rank() == dist.get_world_size() - 1
        self.log: RunLog | None = None
        self.pending: list[dict[str, Any]] = []
        self.evaluated_at: int | None = None
        self.validation_loss: torch.Tensor | None = None
        self.throughput: Throughput | None = None
        self.divergence = Divergence(args.cod_skip_non_finite)

    def install(self) -> None:
        """Stand around the parts of Megatron's loop, once per process."""
        for hook in (
            self.load_checkpoint,
            self.train_step,
            self.training_log,
            self.evaluate,
            self.evaluate_and_print_results,
            self.save_checkpoint_and_time,
            self.checkpoint_and_decide_exit,
            self.post_training_step_callbacks,
        ):
            original = getattr(training, hook.__name__)
            setattr(training, hook.__name__, functools.partial(hook, original))

    def load_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Point Megatron at the newest whole checkpoint of the folder to load from.

        A tracker that says otherwise is set right in the run's own folder, and left alone in others.
        """
        directory = Path(self.args.load or "")
        if not self.args.load or self.args.ckpt_step is not None or not directory.is_dir():
            return original(*args, **kwargs)
        choice = checkpoints.agree_on_newest_whole(directory)
        if choice.damaged is not None:
            if choice.iteration is None:
                raise UserError(f"{choice.damaged}, and there is no older whole checkpoint in {directory}")
            if dist.get_rank() == 0:
                self.say(f"warning: {choice.damaged}; going on from iteration {choice.iteration} instead")
        if choice.iteration is not None and checkpoints.tracked(directory) != str(choice.iteration):
            if self.args.load == self.args.save:
                checkpoints.point_tracker_at(directory, choice.iteration)
            else:
                self.args.ckpt_step = choice.iteration
        verify, self.args.verify_integrity = self.args.verify_integrity, False  # it has just been verified
        result = original(*args, **kwargs)
        self.args.verify_integrity, self.args.ckpt_step = verify, None
        return result

    def open(self, iteration: int) -> None:
        """Open the sinks where `iteration` steps are done: what they hold of later steps is dropped."""
        self.throughput = Throughput(num_devices=self.args.world_size, peak_flops=peak_flops())
        if not self.writes:
            return
        self.log = RunLog(self.run.log, iteration)
        sinks: list[Sink] = [ParquetSink(self.run.stats, iteration)]
        if (writer := get_tensorboard_writer()) is not None:
            sinks.append(TensorBoardSink(writer))
        if (wandb := get_wandb_writer()) is not None:
            sinks.append(WandbSink(wandb, self.args.log_interval))
        self.monitor.sinks = sinks
        if self.monitor.kurtosis_interval:
            self.monitor.dimension_sink = DimensionSink(self.run.dimensions, iteration)

    def train_step(self, original: Callable[..., Any], *args: Any, iteration: int, **kwargs: Any) -> Any:
        """Measure the step. Megatron counts the iterations that are done; this one is the next."""
        if self.throughput is None:
            self.open(iteration)
        assert self.throughput is not None
        # Iterations that Megatron was told to skip are not logged; single dimensions have room for one step.
        if self.monitor.must_collect_before(iteration + 1):
            self.collect(iteration)
        heartbeat.beat()
        self.divergence.guard(args[3])  # the optimizer
        batch_size = get_current_global_batch_size()
        self.monitor.begin_step(iteration + 1)
        result = original(*args, iteration=iteration, **kwargs)
        tokens = (self.args.consumed_train_samples + batch_size) * self.args.seq_length
        self.monitor.end_step(iteration + 1, tokens)
        flops = training.num_floating_point_operations(self.args, batch_size)
        self.throughput.add_step(batch_size * self.args.seq_length, flops)
        return result

    def training_log(
        self,
        original: Callable[..., Any],
        loss_dict: dict[str, torch.Tensor],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        grad_norm: float | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Let Megatron feed its writers; then log, show and check the step."""
        result = original(
            loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter,
            grad_norm, *args, **kwargs,
        )  # fmt: skip
        if self.writes:
            tokens = self.args.consumed_train_samples * self.args.seq_length
            step = {"iteration": iteration, "tokens": tokens, "loss": loss_dict.get("lm loss")}
            self.pending.append(step | {"learning_rate": learning_rate, "grad_norm": grad_norm})
        if not self.divergence.judge(loss_dict, grad_norm, overflowed=bool(skipped_iter)):
            collected = self.collect(iteration)
            self.finish()
            raise self.divergence.stopped(iteration, collected.get(iteration, {}))
        skipping = self.divergence.skipping
        show = iteration % self.args.log_interval == 0 or iteration == self.args.train_iters
        if skipping and self.writes:
            self.pending[-1]["skipped"] = True
        if skipping or show:
            collected = self.collect(iteration, show=show)
            if skipping and self.writes:
                self.say(self.divergence.skipped(iteration, collected.get(iteration, {})))
        return result

    def collect(self, iteration: int, *, show: bool = False) -> dict[int, LayerStatistics]:
        """Reduce and store the statistics of the steps since the last call, and log those steps. Collective."""
        collected = self.monitor.collect()
        if self.writes:
            assert self.log is not None and self.throughput is not None
            for step in self.pending:
                step["loss"] = None if step["loss"] is None else step["loss"].item()
                step["last_layer_variance"] = last_layer_variance(collected, step["iteration"])
            if show:
                self.pending[-1] |= self.throughput.measure()
                self.say(training_line(self.pending[-1], self.args.train_iters))
            for step in self.pending:
                self.log.append(step)
            self.pending.clear()
        return collected

    def evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Keep the validation loss that Megatron would only print."""
        result = original(*args, **kwargs)
        self.validation_loss = (result[0] or {}).get("lm loss")
        return result

    def evaluate_and_print_results(
        self,
        original: Callable[..., Any],
        prefix: str,
        forward_step: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Log the validation perplexity; the final evaluation at an iteration just evaluated is not done twice."""
        on_test_set = "test" in prefix
        if iteration == self.evaluated_at and not on_test_set:
            return
        if self.args.full_validation and isinstance(self.args.eval_iters, int):
            # Upstream makes a number of its list of one length, and expects the list again the next time.
            self.args.eval_iters = [self.args.eval_iters]
        began = time.perf_counter()
        original(prefix, forward_step, data_iterator, model, iteration, *args, **kwargs)
        self._not_training(began)
        if on_test_set:
            return
        if self.throughput is None:  # the run was finished before, perhaps but for this
            self.open(iteration)
        self.evaluated_at = iteration
        if self.writes and self.validation_loss is not None:
            loss = self.validation_loss.item()
            perplexity = math.exp(min(loss, 700.0))
            self.say(f"validation at step {iteration}: loss {loss:.4f}, perplexity {perplexity:.2f}")
            assert self.log is not None
            if iteration not in self.log.validated:
                record = {"validation_loss": loss, "validation_perplexity": perplexity}
                self.log.append({"iteration": iteration} | record)
                self.log.flush()

    def save_checkpoint_and_time(self, original: Callable[..., Any], iteration: int, *args: Any, **kwargs: Any) -> None:
        """Everything up to a checkpoint is on disk before the checkpoint is; a run that took no step saves none."""
        if self.throughput is None:
            return
        self.collect(iteration)
        self.finish()
        began = time.perf_counter()
        original(iteration, *args, **kwargs)
        self._not_training(began)

    def checkpoint_and_decide_exit(
        self, original: Callable[..., Any], model: Any, optimizer: Any, scheduler: Any, iteration: int, *args: Any
    ) -> bool:
        """Tell that Megatron ends the run early: on a signal, after a time, or at an iteration."""
        stops: bool = original(model, optimizer, scheduler, iteration, *args)
        if stops and self.writes:
            self.say(f"stopped at step {iteration}, as asked, and saved; the same command goes on from here")
        return stops

    def post_training_step_callbacks(
        self, original: Callable[..., Any], model: Any, optimizer: Any, scheduler: Any, iteration: int, profiler: Any,
        *args: Any,
    ) -> Any:  # fmt: skip
        """Show what torch's profiler found, when Megatron has stopped it."""
        result = original(model, optimizer, scheduler, iteration, profiler, *args)
        if self.args.cod_profile == "torch" and profiler is not None and iteration == self.args.profile_step_end:
            path = self.run.path / "torch_profile" / f"rank-{dist.get_rank()}.txt"  # beside Megatron's trace
            table = profiling.keep_summary(profiling.kernels_of_torch(profiler), path)
            if self.writes:
                self.say(f"{table}\nkept in {path}, with the trace for chrome://tracing beside it")
        return result

    def _not_training(self, began: float) -> None:
        if self.throughput is not None:
            self.throughput.exclude(time.perf_counter() - began)

    def finish(self) -> None:
        """Make durable what was logged."""
        self.monitor.flush()
        if self.log is not None:
            self.log.flush()
