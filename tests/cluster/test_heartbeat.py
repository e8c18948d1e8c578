"""A container is healthy while steps are made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecod_mcore.cluster import heartbeat


def test_old_missing_and_unnamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heartbeat.FILE, raising=False)
    heartbeat.beat()
    assert heartbeat.FILE in (heartbeat.verdict(0.0) or "")
    path = tmp_path / "heartbeat"
    monkeypatch.setenv(heartbeat.FILE, str(path))
    monkeypatch.setenv(heartbeat.PATIENCE, "60")
    assert str(path) in (heartbeat.verdict(0.0) or "")
    heartbeat.beat()
    touched = path.stat().st_mtime
    assert heartbeat.verdict(touched + 59) is None
    assert heartbeat.verdict(touched + 61) == "no step for 61 s, 60 s are allowed"


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    path.touch()
    command = [sys.executable, "-m", "sparsecod_mcore.cluster.heartbeat"]
    env = {**os.environ, heartbeat.FILE: str(path), "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(command, env=env, timeout=60).returncode == 0
    os.utime(path, (0, 0))
    sick = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert sick.returncode == 1 and sick.stderr.startswith("error: no step for ")
