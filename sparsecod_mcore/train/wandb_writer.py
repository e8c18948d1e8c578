"""Weights & Biases behind a queue: a server that is slow, dead or missing never holds up training.

Megatron calls wandb in its loop. Here one thread makes all of these calls, in their order, from ``init`` to ``finish``;
what cannot be taken any more is dropped and counted. A run whose server does not answer is kept offline, on disk.
"""

import atexit
import contextlib
import os
import queue
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from megatron.training import global_vars, wandb_utils

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.train.output import Say, leave_at_once

WAITING_CALLS = 20_000  # some hours of a run's log intervals
# Seconds that wandb itself spends on a server that does not answer; its own settings, which a user may set.
INIT_TIMEOUT, FINISH_TIMEOUT = ("WANDB_INIT_TIMEOUT", 60.0), ("WANDB_FINISH_TIMEOUT", 60.0)

type Call = Callable[[], Any]


class BackgroundWandb:
    """Stands for the module ``wandb`` where Megatron and the sinks log to it."""

    def __init__(self, wandb: Any, say: Say) -> None:
        self._wandb, self._begin, self._say = wandb, wandb.init, say
        self._calls: queue.Queue[Call | None] = queue.Queue(WAITING_CALLS)
        self._dropped, self._failed = 0, False
        for name, seconds in (INIT_TIMEOUT, FINISH_TIMEOUT):
            os.environ.setdefault(name, str(seconds))
        self._finish_seconds = float(os.environ[FINISH_TIMEOUT[0]]) + 2.0
        self.config = SimpleNamespace(update=lambda *args: self.call(lambda: wandb.config.update(*args)))
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def call(self, function: Call) -> None:
        """Have the thread call `function`, in its turn."""
        try:
            self._calls.put_nowait(function)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._say("warning: W&B does not keep up; what it cannot take is left out there, and in log.jsonl")

    def init(self, **kwargs: Any) -> None:
        """Begin the run; offline where the server does not take it."""
        kwargs["config"] = dict(kwargs.get("config") or {})  # Megatron's arguments, which change as it goes

        def begin() -> None:
            try:
                self._begin(**kwargs)
            except Exception as error:  # wandb has many
                self._say(f"warning: W&B cannot be reached ({_first_line(error)}); the run is kept offline")
                self._begin(**kwargs, mode="offline")

        self.call(begin)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log a record."""
        self.call(lambda: self._wandb.log(*args, **kwargs))

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        """Say which axis a curve has."""
        self.call(lambda: self._wandb.define_metric(*args, **kwargs))

    def log_lines(self, charts: Mapping[str, tuple[str, list[str], list[list[float]]]], step: int) -> None:
        """Log charts by name: a title, the names of two columns, x and y, and rows of them."""

        def log() -> None:
            self._wandb.log(
                {
                    name: self._wandb.plot.line(self._wandb.Table(data=rows, columns=columns), *columns, title=title)
                    for name, (title, columns, rows) in charts.items()
                },
                step,
            )

        self.call(log)

    def finish(self) -> None:
        """End the run, waiting for what is still to be sent no longer than WANDB_FINISH_TIMEOUT and a moment."""
        deadline = time.monotonic() + self._finish_seconds
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=self._finish_seconds)
            self._thread.join(deadline - time.monotonic())
        if self._thread.is_alive():
            self._say("warning: W&B was not done in time; `wandb sync` sends what is kept in the run directory")
            atexit.register(leave_at_once, 0)  # the last registered is the first to run: wandb's own would wait on

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._try(call)
        self._try(self._wandb.finish)

    def _try(self, call: Call) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, it is not worth a run
            if not self._failed:
                self._say(f"warning: W&B failed ({_first_line(error)}); training goes on")
            self._failed = True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def install(say: Say) -> None:
    """Put the queue between Megatron and wandb; call before Megatron opens its writers."""
    open_writer = global_vars._set_wandb_writer

    def set_wandb_writer(args: Namespace) -> None:
        if not args.wandb_project or args.rank != args.world_size - 1:
            return
        if not args.wandb_exp_name:
            raise UserError("wandb_project is given, but not wandb_exp_name, the run's name there")
        wandb: Any
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_project is given, but wandb is not installed (pip install wandb)") from None
        begin, writer = wandb.init, BackgroundWandb(wandb, say)
        wandb.init = writer.init
        open_writer(args)
        wandb.init, global_vars._GLOBAL_WANDB_WRITER = begin, writer
        _keep_artifacts_off_the_loop(writer, wandb)

    global_vars._set_wandb_writer = set_wandb_writer


def _keep_artifacts_off_the_loop(writer: BackgroundWandb, wandb: Any) -> None:
    """Megatron names every checkpoint to W&B when it has saved or loaded it."""
    wandb_utils.get_wandb_writer = lambda: wandb
    for name in ("on_save_checkpoint_success", "on_load_checkpoint_success"):
        tell = getattr(wandb_utils, name)
        setattr(wandb_utils, name, lambda *args, tell=tell: writer.call(lambda: tell(*args)))
