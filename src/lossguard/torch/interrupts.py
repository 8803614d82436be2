"""Keeps Ctrl-C out of where a guard is between two states."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Held:
    """A block that an interrupt waits for: KeyboardInterrupt is raised at its end.

    In threads other than the main one, which get no interrupts, it does nothing.

    >>> with Held():
    ...     pass  # what must be done whole
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._came = False

    def __enter__(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *error: object) -> None:
        before, self._before = self._before, None
        if before is not None:
            signal.signal(signal.SIGINT, before)
            self._raise(before)

    @contextmanager
    def let_in(self) -> Iterator[None]:
        """Inside, interrupts are raised at once again."""
        if self._before is None:
            yield
            return
        signal.signal(signal.SIGINT, self._before)
        try:
            self._raise(self._before)
            yield
        finally:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, *which: object) -> None:
        self._came = True

    def _raise(self, before: Any) -> None:
        if self._came:
            self._came = False
            before(signal.SIGINT, None)
