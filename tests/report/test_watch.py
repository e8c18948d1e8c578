"""A run in the terminal: one frame of it."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.report.watch import Watched, screen, watch
from tests.report.example_runs import write_example_run


def shown(watched: Watched, width: int, seconds_later: float = 0.0) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    now = (watched.path / "log.jsonl").stat().st_mtime + seconds_later
    console.print(screen(watched, width, lambda: now))
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_frame_fits_and_says_what_is_known(width: int, tmp_path: Path) -> None:
    watched = Watched(write_example_run(tmp_path / "run", layers=20, steps=30, target=90, scores=False))
    frame = shown(watched, width)
    assert max(map(len, frame.splitlines())) <= width
    words = " ".join(frame.split())
    # 60 steps of half a second are left.
    assert "step 30 of 90 · 30 s left · 8,192 tokens/s" in words and "validation perplexity 22.2" in words
    bars = re.findall(r"layer +(\d+) +([\d.,e]+) (█*)", frame)
    assert int(bars[0][0]) == 0 and int(bars[-1][0]) == 19 and len(bars) == 16
    assert len(bars[-1][2]) > len(bars[0][2])
    assert any(0x2800 < ord(letter) < 0x2900 for letter in frame), "curves are drawn"
    later = " ".join(shown(watched, width, 500.0).split())
    assert "silent" not in frame and "step 30 of 90 · silent for 8.33 min · loss" in later and "left" not in later


def test_a_run_that_has_just_begun_or_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("train_iters: 10\n")
    watch(tmp_path / "begun", seconds=1.0, once=False)  # output is no terminal: one frame
    assert "nothing is logged yet" in " ".join(capsys.readouterr().out.split())
    done = Watched(write_example_run(tmp_path / "done", layers=2, steps=12, scores=False))
    assert "step 12 of 12 · done" in " ".join(shown(done, 90, 1e6).split())
    with pytest.raises(UserError, match="holds no run"):
        watch(tmp_path, seconds=1.0, once=True)


def test_statistics_are_read_again_when_there_are_more(tmp_path: Path) -> None:
    watched = Watched(write_example_run(tmp_path / "run", layers=2, steps=12, scores=False))
    parts = sorted((tmp_path / "run" / "stats").iterdir())
    last = parts[-1].read_bytes()
    parts[-1].unlink()
    before = watched.profile()
    parts[-1].write_bytes(last)
    after = watched.profile()
    assert before is not None and after is not None and before.iteration < after.iteration == 12
    assert watched.profile() is after
