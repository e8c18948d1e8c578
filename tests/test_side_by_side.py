"""Commands that run at once: whose lines are whose, and what becomes of the others when one fails or all are ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsecod_mcore.side_by_side import run_side_by_side
from tests.conftest import REPOSITORY

SAYS = "import os, sys; print('a', os.environ['OMP_NUM_THREADS'], flush=True); sys.stderr.buffer.write(b'\\xff')"
SLEEPS = ["python", "-c", "import time; print('on', flush=True); time.sleep(60)"]
IGNORES = ["python", "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print('on'); time.sleep(60)"]


def test_lines_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    run_side_by_side({"one": [["python", "-c", SAYS]], "other": [["python", "-c", SAYS]]})
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(" -c ")[0] for line in lines if "$" in line} == {"one   $ python", "other $ python"}
    assert sorted(line for line in lines if "|" in line) == [
        "one   | a 3",
        "one   | \ufffd",
        "other | a 3",
        "other | \ufffd",
    ]


@pytest.mark.parametrize(
    ("dies", "how", "code"), [("exit(7)", "exit code 7", 7), ("os.kill(os.getpid(), 9)", "SIGKILL", 137)]
)
@pytest.mark.parametrize("other", [SLEEPS, IGNORES])
def test_when_one_fails_the_others_are_ended(
    dies: str, how: str, code: int, other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        run_side_by_side({"fails": [["python", "-c", f"import os; {dies}"]], "other": [other]}, grace=2.0)
    assert end.value.code == code and time.monotonic() - began < 30
    assert f"error: fails failed ({how})" in capsys.readouterr().err


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_what_ends_this_process_ends_the_commands(by: signal.Signals) -> None:
    program = f"from sparsecod_mcore.side_by_side import run_side_by_side; run_side_by_side({{'one': [{SLEEPS}]}})"
    words = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None and parent.stdout.readline().startswith(b"one $ python")
        assert parent.stdout.readline() == b"one | on\n"
        [child] = _children(parent.pid)
        parent.send_signal(by)
        parent.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def _children(parent: int) -> list[int]:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            if found := file.read().split():
                return [int(number) for number in found]
        time.sleep(0.05)
    return []


def test_the_next_command_of_a_name_is_asked_for_when_the_one_before_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    over = tmp_path / "over"  # which the other leaves
    wait = f"import os, time\nwhile not os.path.exists({str(over)!r}): time.sleep(0.1)\ntime.sleep(1)\n{SAYS}"
    asked_for = []

    def one_after_another() -> Iterator[list[str]]:
        yield ["python", "-c", wait]
        asked_for.append(over.exists())
        yield ["python", "-c", SAYS]

    leave = f"print('first'); open({str(over)!r}, 'w')"
    run_side_by_side({"none": [], "two": one_after_another(), "one": [["python", "-c", leave]]})
    assert asked_for == [True]
    said = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert said == ["one  | first", "two  | a 3", "two  | \ufffd", "two  | a 6", "two  | \ufffd"]  # alone at the end


def test_children_that_stay_behind_are_ended(capsys: pytest.CaptureFixture[str]) -> None:
    program = f"import subprocess, sys; print(subprocess.Popen([sys.executable, *{SLEEPS[1:]}]).pid, flush=True)"
    began = time.monotonic()
    run_side_by_side({"parent": [["python", "-c", program]]})
    assert time.monotonic() - began < 30
    [child] = [
        int(line.split("|")[1]) for line in capsys.readouterr().out.splitlines() if line.split("|")[-1][1:].isdigit()
    ]
    until = time.monotonic() + 10
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_to_run() -> None:
    run_side_by_side({})
