"""Only whole checkpoints are resumed from: a damaged one is named and passed over for an older good one."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME, verify_integrity_manifest
from torch.distributed.checkpoint import FileSystemReader

from sparsecod_mcore.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_directory(directory: Path, iteration: int) -> Path:
    """Where Megatron keeps the checkpoint of `iteration`."""
    return directory / f"iter_{iteration:07d}"


def finished_iterations(directory: Path) -> list[int]:
    """Iterations whose save was finished, newest first; what was being written when a run died is left out.

    Megatron writes the tracker last, so a folder newer than it is unfinished. A tracker that is itself damaged (its
    write is not atomic) says nothing; then Megatron's ``metadata.json``, written after the tensors, must be there.
    """
    iterations = sorted(
        (int(path.name.removeprefix("iter_")) for path in directory.glob("iter_*") if path.is_dir()),
        reverse=True,
    )
    tracker = directory / TRACKER
    latest = tracker.read_text().strip() if tracker.exists() else ""
    if latest.isdigit():
        return [iteration for iteration in iterations if iteration <= int(latest)]
    return [i for i in iterations if (iteration_directory(directory, i) / "metadata.json").exists()]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None.

    With ``verify_integrity`` every file was hashed when it was saved and any changed byte is found; otherwise missing
    and truncated files are. Every rank must call it: hashes are compared on rank 0 and the answer is broadcast.
    """
    if (checkpoint / INTEGRITY_FNAME).exists():
        try:
            verify_integrity_manifest(str(checkpoint))
        except CheckpointingException as error:
            return _first_damaged_file(checkpoint, str(error))
        except json.JSONDecodeError:
            return f"{checkpoint / INTEGRITY_FNAME} is not readable"
        return None
    return next(_size_mismatches(checkpoint), None)


def _first_damaged_file(checkpoint: Path, report: str) -> str:
    name, _, what = report.splitlines()[-1].strip().partition(": ")
    return f"{checkpoint / name} has changed since it was saved ({what})"


def _size_mismatches(checkpoint: Path) -> Iterator[str]:
    if not (checkpoint / "metadata.json").exists():
        yield f"{checkpoint / 'metadata.json'} is missing"
        return
    try:
        metadata = FileSystemReader(checkpoint).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
        yield f"{checkpoint / '.metadata'} is not readable ({error})"
        return
    needed: dict[str, int] = {}
    for item in metadata.storage_data.values():
        end = item.offset + item.length
        needed[item.relative_path] = max(needed.get(item.relative_path, 0), end)
    for name, size in sorted(needed.items()):
        path = checkpoint / name
        if not path.exists():
            yield f"{path} is missing"
        elif path.stat().st_size < size:
            yield f"{path} has {path.stat().st_size} bytes of {size}"


def newest_whole_iteration(directory: Path) -> int | None:
    """The iteration to resume from, or None when nothing was ever saved. Collective over all ranks.

    Raises `UserError` when there are checkpoints and all are damaged: starting anew would overwrite them.
    """
    first_damage = None
    for iteration in finished_iterations(directory):
        found = damage(iteration_directory(directory, iteration))
        if found is None:
            if first_damage is not None and dist.get_rank() == 0:
                print(f"warning: {first_damage}; going on from iteration {iteration} instead", flush=True)
            return iteration
        first_damage = first_damage or found
    if first_damage is not None:
        raise UserError(f"{first_damage}, and there is no older whole checkpoint in {directory}")
    return None


def point_tracker_at(directory: Path, iteration: int) -> None:
    """Make Megatron load `iteration`; rank 0 writes, all ranks wait for it."""
    if dist.get_rank() == 0:
        temporary = directory / f"{TRACKER}.tmp"
        temporary.write_text(str(iteration))
        temporary.replace(directory / TRACKER)
    dist.barrier()
    torch.cuda.synchronize()
