"""A save that is cut off at any byte is never taken for a checkpoint, and never costs the one before it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sparsecod_mcore import platform

platform.prepare()

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config  # noqa: E402
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME, save_integrity_manifest  # noqa: E402

from sparsecod_mcore.train.checkpoints import TRACKER, Choice, finished_iterations, newest_whole  # noqa: E402

# The order in which Megatron writes the files of a torch_dist checkpoint.
ORDER = ["__0_0.distcp", ".metadata", "metadata.json", INTEGRITY_FNAME]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of torch's format with Megatron's files beside it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "iter_0000002"
    dcp.save({"weight": torch.arange(50.0), "bias": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    save_integrity_manifest(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == sorted(ORDER)
    return folder


def cut_saves(checkpoint: Path, target: Path, files: list[str]) -> Iterator[str]:
    """Lay down in `target` every state that a save of `files`, in order, can be cut off in; yield where it is."""
    target.mkdir()
    for name in files:
        content = (checkpoint / name).read_bytes()
        every = 1 if len(content) < 1000 else 97
        for size in range(0, len(content), every):
            (target / name).write_bytes(content[:size])
            yield f"{name} after {size} of {len(content)} bytes"
        (target / name).write_bytes(content)
        yield f"{name} written"


@pytest.mark.parametrize("files", [ORDER, ORDER[:-1]], ids=["verify_integrity", "sizes"])
def test_cut_off_before_the_tracker(files: list[str], checkpoint: Path, tmp_path: Path) -> None:
    """The tracker still names the checkpoint before, which is what is gone on from, without a word of damage."""
    shutil.copytree(checkpoint, tmp_path / "iter_0000002")
    (tmp_path / TRACKER).write_text("2")
    states = 0
    for state in cut_saves(checkpoint, tmp_path / "iter_0000004", files):
        assert newest_whole(tmp_path) == Choice(2), state
        states += 1
    assert states > 100


def test_the_first_save_cut_off(checkpoint: Path, tmp_path: Path) -> None:
    """Nothing was ever finished: a run begins anew, unless all that its tensors need is there."""
    whole = {"metadata.json written", f"{INTEGRITY_FNAME} written"}
    for state in cut_saves(checkpoint, tmp_path / "iter_0000004", ORDER):
        assert newest_whole(tmp_path) == Choice(4 if state in whole else None), state


@pytest.mark.parametrize("torn", ["", "1", "9", "\0\0"])
def test_torn_tracker(torn: str, checkpoint: Path, tmp_path: Path) -> None:
    """A tracker that says nothing, or names what is not there, leaves the decision to the checkpoints."""
    for name in ("iter_0000010", "iter_0000012"):
        shutil.copytree(checkpoint, tmp_path / name)
    (tmp_path / "iter_0000014").mkdir()
    (tmp_path / TRACKER).write_text(torn)
    assert finished_iterations(tmp_path) == [12, 10] and newest_whole(tmp_path) == Choice(12)


def test_a_tracker_set_back_is_obeyed(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("iter_0000010", "iter_0000012"):
        shutil.copytree(checkpoint, tmp_path / name)
    (tmp_path / TRACKER).write_text("10")
    assert newest_whole(tmp_path) == Choice(10)


@pytest.mark.parametrize("name", ORDER[:-1])
def test_damage_after_the_save_is_named(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """A finished checkpoint that is cut later is named and passed over for the one before it."""
    for folder in ("iter_0000002", "iter_0000004"):
        shutil.copytree(checkpoint, tmp_path / folder)
        (tmp_path / folder / INTEGRITY_FNAME).unlink()
    (tmp_path / TRACKER).write_text("4")
    damaged = tmp_path / "iter_0000004" / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    choice = newest_whole(tmp_path)
    assert choice.iteration == 2 and str(damaged) in (choice.damaged or "")
    assert json.loads((tmp_path / "iter_0000002" / "metadata.json").read_text())
