"""Work in units: spread over workers, recorded as it is done, and shown."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from sparsecod_mcore.progress import ProgressLine
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.plan import TOKENS_AT_ONCE
from sparsecod_mcore.scoring.stack import Stack
from sparsecod_mcore.scoring.work_file import WorkFiles

type Record = dict[str, list[Any]]  # what a unit gives, as JSON keeps it


def tokens_at_once(stack: Stack, given: int | None) -> int:
    """How many tokens the model is given together: `given`, or as many as run at full speed."""
    return TOKENS_AT_ONCE[stack.device.type] if given is None else given


class _Progress(ProgressLine):
    """Tells what is done of the first worker's share, which is like the others', and tokens/s of it."""

    def __init__(self, what: str, units: int, tokens: int) -> None:
        super().__init__(what)
        self._units, self._tokens = units, tokens
        self._done_units = self._done_tokens = 0

    def advance(self, tokens: int) -> None:
        self._done_units += 1
        self._done_tokens += tokens
        self.show(self._done_tokens / self._tokens)

    def amounts(self, seconds: float) -> str:
        speed = self._done_tokens * parallel.workers() / seconds
        return f"{self._done_units:,} of {self._units:,} batches, {speed:,.0f} tokens/s"


def run_units[Unit](
    what: str,
    units: Mapping[str, Unit],
    run: Callable[[Unit], Record],
    tokens_of: Callable[[Unit], int],
    files: WorkFiles[Record] | None,
) -> dict[str, Record]:
    """What `run` makes of each of `units`, by their names; what `files` know is not run again. Collective.

    A unit's record must not depend on what other units there are, nor on the number of workers.
    """
    known = {} if files is None else parallel.from_first(files.read)
    todo = [name for name in units if name not in known]
    mine = todo[parallel.worker() :: parallel.workers()]
    measured: dict[str, Record] = {}
    with ExitStack() as shown:
        progress = None
        if parallel.is_first() and mine:
            tokens = sum(tokens_of(units[name]) for name in mine)
            progress = shown.enter_context(_Progress(what, len(mine), tokens))
        for name in mine:
            measured[name] = run(units[name])
            if files is not None and parallel.is_first_of_worker():
                files.append(parallel.worker(), name, measured[name])
            if progress is not None:
                progress.advance(tokens_of(units[name]))
    for others in parallel.gather_from_workers(measured):
        known |= others
    return {name: known[name] for name in units}
