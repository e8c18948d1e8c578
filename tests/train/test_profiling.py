"""Profiling under a tool: the same command once more, within the tool, and then what the tool says of it."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.errors import UserError  # noqa: E402
from sparsecod_mcore.train import profiling  # noqa: E402
from tests.report.test_profile import NSYS  # noqa: E402

# Runs what it is to profile; says what nsys would of it.
FAKE_NSYS = f"""#!{sys.executable}
import subprocess, sys
if sys.argv[1] == "profile":
    words = sys.argv[2:]
    while words[0].startswith("--"):
        flag = words.pop(0)
        if flag.startswith("--output="):
            open(flag.removeprefix("--output=") + ".nsys-rep", "w").write("report")
    sys.exit(subprocess.run(words).returncode)
assert open(sys.argv[-1]).read() == "report"
print({NSYS!r})
"""


def arguments(profile: str | None) -> Namespace:
    return Namespace(cod_profile=profile, profile=False, use_pytorch_profiler=False, profile_ranks=[], rank=0)


@pytest.fixture
def nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nsys"
    tool.write_text(FAKE_NSYS)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv(profiling.UNDER, raising=False)
    monkeypatch.setattr(platform, "has_gpu", lambda: True)


def test_nsys(nsys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    program, seen = tmp_path / "program.py", tmp_path / "seen.json"
    found = f"[sys.argv[1:], os.environ.get({profiling.UNDER!r})]"
    program.write_text(f"import json, os, sys\njson.dump({found}, open({str(seen)!r}, 'w'))\n")
    monkeypatch.setattr(sys, "argv", [str(program)])
    args = arguments("nsys")
    profiling.prepare(args)
    assert args.profile and not args.use_pytorch_profiler
    assert profiling.run_under_tool(args, tmp_path / "run", ["--lr", "1"]) == 0
    assert json.loads(seen.read_text()) == [["--lr", "1"], "nsys"]
    assert "25.0% of it in this project's statistics" in capfd.readouterr().out
    assert "gemm<float" in (tmp_path / "run" / "profile" / "rank-0.txt").read_text()
    monkeypatch.setenv(profiling.UNDER, "nsys")
    assert profiling.run_under_tool(args, tmp_path / "run", []) is None, "under the tool, the program itself runs"


def test_what_is_not_asked_for_is_not_run(nsys: None, tmp_path: Path) -> None:
    for profile in (None, "torch"):
        assert profiling.run_under_tool(arguments(profile), tmp_path / "run", []) is None
    elsewhere = arguments("nsys")
    elsewhere.profile_ranks = [3]
    assert profiling.run_under_tool(elsewhere, tmp_path / "run", []) is None


def test_tools_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cod\.profile nsys needs a GPU; torch profiles without one"):
        profiling.prepare(arguments("nsys"))
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="publishes it no more for images with Hopper; use nsys"):
        profiling.prepare(arguments("dlprof"))
    with pytest.raises(UserError, match="nsys is not on PATH"):
        profiling.prepare(arguments("nsys"))
