"""What an error says of the surroundings: full disks and lost processes, and nothing else."""

import errno
from pathlib import Path

import pytest
from torch.distributed.checkpoint import CheckpointException

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.train.checkpoints import TRACKER  # noqa: E402
from sparsecod_mcore.train.faults import interruption  # noqa: E402

FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/x/__0_0.distcp")


def caused_by(error: BaseException) -> RuntimeError:
    outer = RuntimeError("saving failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, "the disk is full: /runs/x/__0_0.distcp could not be written"),
        (caused_by(FULL), "the disk is full: /runs/x/__0_0.distcp could not be written"),
        (RuntimeError("Worker failure: [Errno 28] No space left on device"), "the disk is full: the output"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:9"), "lost contact"),
        (RuntimeError("Timed out waiting 8000ms for recv operation to complete"), "lost contact"),
        (CheckpointException("write", {0: (OSError(28, "No space left on device"), None)}), "the disk is full"),
        (CheckpointException("write", {}), "the checkpoint could not be saved (see the other ranks; "),
        (CheckpointException("write", {1: (RuntimeError("no rights"), None)}), "the checkpoint could not be saved (no"),
        (ConnectionResetError(104, "Connection reset by peer"), "lost contact"),
    ],
)
def test_told(error: BaseException, reason: str, tmp_path: Path) -> None:
    told = str(interruption(error, tmp_path, 7))
    assert told.startswith(reason) and "at iteration 7; nothing was saved before" in told and "\n" not in told
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / TRACKER).write_text("4")
    assert "the checkpoint of iteration 4 is untouched" in str(interruption(error, tmp_path, 7))


@pytest.mark.parametrize("error", [ValueError("shapes differ"), KeyError("x"), OSError(errno.ENOENT, "no such file")])
def test_bugs_stay_bugs(error: BaseException, tmp_path: Path) -> None:
    assert interruption(error, tmp_path, 7) is None
