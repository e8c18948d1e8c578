"""Progress of work on documents: a bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from typing import Self

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_BARS = 0.1


class Progress:
    """Tells documents, documents/s, MB/s of text and, where the share done is known, the time left.

    What an interrupted run had finished counts towards the share done and not towards the speed. Leaving the
    context without an error leaves a line with the totals behind.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = time.monotonic()
        self._documents = 0
        self._text_bytes = 0
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
        """Note that the corpus is done up to `share` already."""
        self._share_at_start = share or 0.0

    def advance(self, documents: int, text_bytes: int, share: float | None) -> None:
        """Count `documents` of together `text_bytes` bytes; `share` of the corpus is done now."""
        self._documents += documents
        self._text_bytes += text_bytes
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
        amounts = (
            f"{self._documents:,} documents, {self._text_bytes / 1e6:,.1f} MB, "
            f"{self._documents / seconds:,.1f} documents/s, {self._text_bytes / 1e6 / seconds:,.2f} MB/s"
        )
        if share is None:
            return f"{self._what}: {tqdm.format_interval(seconds)}, {amounts}"
        left = (1 - share) * seconds / max(share - self._share_at_start, 1e-9)
        # First what is read most: a narrow terminal shows the beginning only.
        return f"{self._what}: {share:.0%} done, {tqdm.format_interval(left)} left, {amounts}"
