"""Only whole checkpoints are resumed from: a damaged one is named and passed over for an older good one."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.train.checkpoint_metadata import read_metadata

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Choice:
    """What to resume from: an iteration, or None where nothing was saved or Megatron is to judge."""

    iteration: int | None
    damaged: str | None = None  # one sentence about the newest damaged checkpoint


def iteration_directory(directory: Path, iteration: int) -> Path:
    """Where Megatron keeps the checkpoint of `iteration`."""
    return directory / f"iter_{iteration:07d}"


def tracked(directory: Path) -> str:
    """What Megatron's tracker says is the latest checkpoint; empty where there is none."""
    tracker = directory / TRACKER
    return tracker.read_text().strip() if tracker.exists() else ""


def finished_iterations(directory: Path) -> list[int]:
    """Iterations whose save was finished, newest first; what was being written when a run died is left out.

    Megatron writes the tracker last, so a folder newer than it is unfinished. A tracker that is damaged (its write is
    not atomic) or names what is not there says nothing; then ``metadata.json``, which Megatron writes whole after all
    tensors, must be there.
    """
    found = (path.name.removeprefix("iter_") for path in directory.glob("iter_*") if path.is_dir())
    iterations = sorted(map(int, filter(str.isdigit, found)), reverse=True)
    latest = tracked(directory)
    if latest.isdigit() and int(latest) in iterations:
        return [iteration for iteration in iterations if iteration <= int(latest)]
    return [i for i in iterations if _missing_metadata(iteration_directory(directory, i)) is None]


def _missing_metadata(checkpoint: Path) -> str | None:
    """What is wrong with ``metadata.json``, which says that the tensors are all there, or None."""
    path = checkpoint / CONFIG_FNAME
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError):
        return f"{path} is not readable"
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None.

    With ``verify_integrity`` every file was hashed when it was saved, and any changed byte is found; otherwise missing
    and truncated files are. Formats other than torch_dist are left to Megatron.
    """
    if (checkpoint / INTEGRITY_FNAME).exists():
        return _changed_file(checkpoint)
    if any(checkpoint.glob("mp_rank_*")):
        return None
    return _cut_file(checkpoint)


def _changed_file(checkpoint: Path) -> str | None:
    try:
        digests: dict[str, str] = json.loads((checkpoint / INTEGRITY_FNAME).read_text())["files"]
    except (ValueError, KeyError):
        return f"{checkpoint / INTEGRITY_FNAME} is not readable"
    for name, expected in digests.items():
        path = checkpoint / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if found != expected:
            return f"{path} has changed since it was saved"
    return None


def _cut_file(checkpoint: Path) -> str | None:
    if missing := _missing_metadata(checkpoint):
        return missing
    try:
        metadata = read_metadata(checkpoint)
    except UserError as error:
        return str(error)
    needed: dict[str, int] = {}
    for item in metadata.storage_data.values():
        needed[item.relative_path] = max(needed.get(item.relative_path, 0), item.offset + item.length)
    for name, size in sorted(needed.items()):
        path = checkpoint / name
        if not path.exists():
            return f"{path} is missing"
        if path.stat().st_size < size:
            return f"{path} has {path.stat().st_size} bytes of {size}"
    return None


def newest_whole(directory: Path) -> Choice:
    """The newest whole checkpoint in `directory`, as this process sees it."""
    first_damage = None
    if tracked(directory) == "release":
        return Choice(None)
    for iteration in finished_iterations(directory):
        found = damage(iteration_directory(directory, iteration))
        if found is None:
            return Choice(iteration, first_damage)
        first_damage = first_damage or found
    # Without a tracker no save was ever finished: there is nothing to lose by starting anew.
    return Choice(None, first_damage if (directory / TRACKER).exists() else None)


def agree_on_newest_whole(directory: Path) -> Choice:
    """`newest_whole` as rank 0 sees it, on every rank. Collective: ranks may see a shared disk at different moments."""
    answer = [newest_whole(directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    assert answer[0] is not None
    return answer[0]


def point_tracker_at(directory: Path, iteration: int) -> None:
    """Make `iteration` the checkpoint that Megatron takes for the latest; rank 0 writes, all ranks wait for it."""
    if dist.get_rank() == 0:
        temporary = directory / f"{TRACKER}.tmp"
        temporary.write_text(str(iteration))
        temporary.replace(directory / TRACKER)
    dist.barrier()
