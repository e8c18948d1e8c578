"""Work spread over processes, its results in the order of its input."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

_AHEAD = 2  # tasks in flight per worker: one being worked on, one waiting, so that memory stays bounded


def available_cores() -> int:
    """Number of cores this process may run on (a container or job scheduler may allow fewer than exist)."""
    return len(os.sched_getaffinity(0))


def ordered_map[T, R](
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[object, ...] = (),
) -> Iterator[R]:
    """Yield ``function(item)`` in the order of `items`, which are drawn only a few ahead of the results.

    With one worker everything runs in this process. Otherwise the workers are spawned, not forked (readers
    may have started threads by then); they import `function` by name, leave interrupts to this process, and
    end with it even if it is killed. An exception raised by `function` is raised here in the place of its
    result.
    """
    if workers == 1:
        if initializer:
            initializer(*initargs)
        yield from map(function, items)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(initializer, initargs),
    ) as pool:
        in_flight: deque[Future[R]] = deque()
        try:
            for item in items:
                with _interrupts_held_back():
                    in_flight.append(pool.submit(function, item))
                if len(in_flight) >= _AHEAD * workers:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start workers undisturbed, and such that they never see an interrupt: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a process inherits from its start
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if held:
        signal.raise_signal(signal.SIGINT)


def _start_worker(initializer: Callable[..., object] | None, initargs: tuple[object, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer:
        initializer(*initargs)


def _end_with_parent() -> None:
    # A killed parent cannot stop its workers, and they hold both ends of the queue they wait on: they stay.
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(OSError):
        parent.join()
    os._exit(1)
