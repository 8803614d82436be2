"""Keeps Ctrl-C out of where a guard is between two states."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[None]:
    """A block that Ctrl-C waits for: KeyboardInterrupt comes at its end, of a second one at once.

    In threads other than the main one, which get no interrupts, it does nothing.

    >>> with held():
    ...     pass  # what must be done whole
    """
    before, came = signal.getsignal(signal.SIGINT), 0
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def note(*which: object) -> None:
        nonlocal came
        came += 1
        if came > 1:
            before(signal.SIGINT, None)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(signal.SIGINT, None)
