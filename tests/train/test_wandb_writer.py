"""W&B that fails, hangs or does not keep up costs training nothing but its curves."""

import atexit
import threading
import time
from types import SimpleNamespace

import pytest

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.train import wandb_writer  # noqa: E402
from sparsecod_mcore.train.output import leave_at_once  # noqa: E402
from sparsecod_mcore.train.wandb_writer import BackgroundWandb  # noqa: E402


def recorder(**broken) -> tuple[SimpleNamespace, list]:
    """A wandb that keeps what it is given; of `broken` the functions given take the place."""
    calls: list = []
    keep = {name: lambda *a, n=name, **k: calls.append((n, a, k)) for name in ("init", "log", "finish")}
    return SimpleNamespace(**(keep | broken)), calls


def test_calls_arrive_in_order() -> None:
    wandb, calls = recorder()
    writer = BackgroundWandb(wandb, print)
    writer.init(project="p")
    for step in range(100):
        writer.log({"loss": step}, step)
    writer.finish()
    assert calls[0] == ("init", (), {"project": "p", "config": {}})
    assert [call[1][1] for call in calls[1:-1]] == list(range(100)) and calls[-1][0] == "finish"


def test_a_server_that_refuses_is_said_once_and_the_run_kept_offline() -> None:
    kept = []

    def init(**kwargs: object) -> None:
        if "mode" not in kwargs:
            raise OSError("no route\nto there")
        kept.append(kwargs["mode"])

    said: list[str] = []
    wandb, calls = recorder(init=init)
    writer = BackgroundWandb(wandb, said.append)
    writer.init(project="p")
    writer.log({"loss": 1.0}, 1)
    writer.finish()
    assert kept == ["offline"] and [call[0] for call in calls] == ["log", "finish"]
    assert said == ["warning: W&B cannot be reached (no route); the run is kept offline"]


def test_errors_do_not_end_training() -> None:
    def log(*args: object) -> None:
        raise RuntimeError("broken")

    said: list[str] = []
    wandb, calls = recorder(log=log)
    writer = BackgroundWandb(wandb, said.append)
    writer.log({}, 1)
    writer.log({}, 2)
    writer.finish()
    assert said == ["warning: W&B failed (broken); training goes on"] and calls[-1][0] == "finish"


def test_a_hung_server_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "0.1")
    monkeypatch.setattr(wandb_writer, "WAITING_CALLS", 10)
    left: list = []
    monkeypatch.setattr(atexit, "register", lambda *call: left.append(call))
    said: list[str] = []
    answer = threading.Event()
    wandb, _ = recorder(log=lambda *args: answer.wait())
    writer = BackgroundWandb(wandb, said.append)
    began = time.monotonic()
    for step in range(1000):
        writer.log({}, step)
    assert time.monotonic() - began < 0.5
    writer.finish()
    assert time.monotonic() - began < 4.0
    assert [line.split(";")[0] for line in said] == [
        "warning: W&B does not keep up",
        "warning: W&B was not done in time",
    ]
    assert left == [(leave_at_once, 0)], "nothing of wandb is waited for at the end of the process"
    answer.set()
