"""Being told to end."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM, which by itself ends a process on the spot, raises `SystemExit` instead, so that things are put away.

    Only in the main thread, where signals can be handled, and not where SIGTERM is ignored.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return

    def leave(number: int, _: object) -> None:
        print("told to end (SIGTERM)", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None where another language set it
