"""Commands that run at once: whose lines are whose, and what becomes of the others when one fails."""

import time

import pytest

from sparsecod_mcore.side_by_side import run_side_by_side

SAYS = "import os, sys; print('a', os.environ['OMP_NUM_THREADS'], flush=True); print('b', file=sys.stderr)"


def test_lines_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    run_side_by_side({"one": ["python", "-c", SAYS], "other": ["python", "-c", SAYS]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("one   $ python -c 'import os") and lines[1].startswith("other $ python -c")
    assert sorted(lines[2:]) == ["one   | a 3", "one   | b", "other | a 3", "other | b"]


def test_when_one_fails_the_others_are_ended() -> None:
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        run_side_by_side(
            {"fails": ["python", "-c", "exit(7)"], "sleeps": ["python", "-c", "import time; time.sleep(60)"]}
        )
    assert end.value.code == 7 and time.monotonic() - began < 30
    run_side_by_side({})
