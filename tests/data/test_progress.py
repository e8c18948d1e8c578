"""Progress, as a log file and as a terminal see it."""

import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from sparsecod_mcore import progress as progress_module
from sparsecod_mcore.data.progress import Progress

REPOSITORY = Path(__file__).parents[2]


def test_plain_lines_tell_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0.0, 5.0, 20.0, 40.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(seconds))
    with Progress("reading") as progress:
        progress.skip(0.5)
        progress.advance(100, 1_000_000, 0.51)  # too soon after the start for a line
        progress.advance(100, 1_000_000, 0.6)
    assert capsys.readouterr().out.splitlines() == [
        # A tenth of the corpus took 20 s, and four tenths are left.
        "reading: 60% done, 01:20 left, 200 documents, 2.0 MB, 10.0 documents/s, 0.10 MB/s",
        "reading: 00:40, 200 documents, 2.0 MB, 5.0 documents/s, 0.05 MB/s",
    ]


def test_a_terminal_sees_a_bar(corpus_path: Path, tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    tool = REPOSITORY / "tools" / "train_tokenizer.py"
    done = subprocess.run(
        [sys.executable, tool, corpus_path, "--vocab-size", "300", "--output", tmp_path / "t.json"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=terminal,
        check=True,
        text=True,
    )
    assert select.select([master], [], [], 0)[0], "nothing was shown"
    shown = os.read(master, 100_000).decode()
    os.close(terminal)
    os.close(master)
    assert "| counting words: " in shown and " left, " in shown
    assert ", 60 documents, " in done.stdout
