"""Progress of long computations, on stderr: a bar on a terminal, a line now and then elsewhere."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ..cli.terminal import PlainConsole, shown

QUIET_SECONDS = 30.0
STOPPING = b"\nstopping once what is under way is saved; Ctrl-C again loses it\n"
STOPS = signal.SIGINT, signal.SIGTERM
"""Ctrl-C, and what ``kill`` and the schedulers of clusters send."""


class Progress:
    """``with Progress("Adam", total=1000) as p: p.advance(10, loss=0.3)``.

    ``first`` is said at the start, before anything is done. ``seconds`` is the time since then,
    without what an earlier run of the same spent.
    """

    def __init__(
        self, label: str, *, total: int, done: int = 0, unit: str = "steps", first: str = ""
    ) -> None:
        console = PlainConsole(stderr=True)
        self._unit, self._first = unit, first
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar.add_task(shown(label), total=total, completed=done, figures=first)

    def __enter__(self) -> Self:
        self._started = self._said = time.perf_counter()
        self._bar.start()
        if self._first:
            self._say(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _say(self, text: str) -> None:
        """In a line, where there is no bar."""
        if self._bar.disable:
            label = self._bar.tasks[0].description
            with suppress(OSError):  # nobody reads it: the run goes on
                self._bar.console.print(f"{label}: {text}", soft_wrap=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def advance(self, count: int, **figures: float | str) -> None:
        """So many more are done, and these are the current figures."""
        told = (f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in figures.items())
        text = "  ".join(told)
        (task,), now = self._bar.tasks, time.perf_counter()
        self._bar.update(task.id, advance=count, figures=text)
        if now - self._said > QUIET_SECONDS:
            self._said = now
            self._say(f"{task.completed} of {task.total} {self._unit}  {text}")


@contextmanager
def stopping_at_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, a first of ``STOPS`` only makes the function that it yields return true.

    For loops that must not be torn apart in the middle of an iteration, and for JAX, which loses a
    Ctrl-C that comes in the middle of Python's collection of garbage. Signals go to the main
    thread: in any other this changes nothing, nor where a signal is ignored, as in a shell's
    background.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        put_back()
        if sys.stderr is not None:  # else 2 may be a file of the run
            with suppress(OSError):  # the same Ctrl-C may have stopped who reads it
                os.write(2, STOPPING)  # nothing else is safe in a signal handler

    def put_back() -> None:
        for one, handler in before.items():
            signal.signal(one, handler)

    before = {one: now for one in STOPS if (now := signal.getsignal(one)) != signal.SIG_IGN}
    try:
        for one in before:
            signal.signal(one, stop)
        yield lambda: stopped
    finally:
        put_back()
