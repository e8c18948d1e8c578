"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from typing import Self

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_BARS = 0.1


class ProgressLine:
    """Tells what is done and, where the share done is known, the time left.

    What an interrupted run had finished counts towards the share done and not towards the speed. Leaving the
    context without an error leaves a line with the totals behind.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = time.monotonic()
        self._share_at_start = 0.0
        self._bar = tqdm(total=100, bar_format="|{bar:10}| {desc}", leave=False) if sys.stderr.isatty() else None
        self._interval = _SECONDS_BETWEEN_LINES if self._bar is None else _SECONDS_BETWEEN_BARS
        self._last_shown = self._start if self._bar is None else -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is None:
            print(self._line(time.monotonic(), None), flush=True)

    def skip(self, share: float | None) -> None:
        """Note that the work is done up to `share` already."""
        self._share_at_start = share or 0.0

    def amounts(self, seconds: float) -> str:
        """What was done in `seconds`, for the end of the line."""
        raise NotImplementedError

    def show(self, share: float | None) -> None:
        """`share` of the work is done now: say so, unless something was said a moment ago."""
        now = time.monotonic()
        if now - self._last_shown < self._interval:
            return
        self._last_shown = now
        if self._bar is None:
            print(self._line(now, share), flush=True)
        else:
            self._bar.n = round(100 * (share or 0.0))
            self._bar.set_description_str(self._line(now, share))

    def _line(self, now: float, share: float | None) -> str:
        seconds = max(now - self._start, 1e-9)
        amounts = self.amounts(seconds)
        if share is None:
            return f"{self._what}: {tqdm.format_interval(seconds)}, {amounts}"
        left = (1 - share) * seconds / max(share - self._share_at_start, 1e-9)
        # First what is read most: a narrow terminal shows the beginning only.
        return f"{self._what}: {share:.0%} done, {tqdm.format_interval(left)} left, {amounts}"
