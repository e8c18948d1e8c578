"""What can go wrong around a run that is not its own doing, told in one sentence: a full disk, a lost process."""

import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from sparsecod_mcore.train import checkpoints

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Writers of checkpoints hand errors on from thread to thread and process to process as text.
_FULL_IN_WORDS = re.compile(r"No space left on device|Disk quota exceeded|File too large|unexpected pos \d+ vs")
# gloo's errors are plain RuntimeErrors.
_LOST_IN_WORDS = re.compile(
    r"Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe|No route to host"
    r"|Network is unreachable|[Tt]imed out waiting|[Tt]imed out after|wait timeout|NCCL.*(timeout|remote)"
)


class RunInterrupted(RuntimeError):
    """The run ends for something outside of it; the message says what, and what the next start goes on from."""


def interruption(error: BaseException, saved_in: Path, iteration: int) -> RunInterrupted | None:
    """What `error`, at step `iteration`, says of the surroundings; None if it is an error of another kind."""
    reason = _reason(error, saved_in)
    if reason is None:
        return None
    saved = checkpoints.finished_iterations(saved_in)
    kept = f"the checkpoint of iteration {saved[0]} is untouched" if saved else "nothing was saved before"
    return RunInterrupted(f"{reason} at iteration {iteration}; {kept}, and the same command goes on from there")


def _reason(error: BaseException, saved_in: Path) -> str | None:
    chain = list(_chain(error))
    for link in chain:
        if (isinstance(link, OSError) and link.errno in _FULL) or _FULL_IN_WORDS.search(str(link)):
            name = getattr(link, "filename", None)
            return f"the disk is full: {name or 'the output'} could not be written"
    for link in chain:
        if isinstance(link, CheckpointException):  # in full on the rank that coordinates, elsewhere without a reason
            failures = _one_line(*(str(error) for error, _ in link.failures.values())) or "see the other ranks"
            return f"the checkpoint could not be saved ({failures}; {_free(saved_in)})"
        if isinstance(link, dist.DistError | ConnectionError) or _LOST_IN_WORDS.search(str(link)):
            return f"lost contact with another process ({_one_line(str(link))})"
    return None


def _free(folder: Path) -> str:
    """Megatron's writer swallows the reason, which mostly is this one."""
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free in {folder}"


def _one_line(*texts: str) -> str:
    return " ".join(" ".join(texts).split())[:200]


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
