"""How fast a run's loss falls: its smoothed loss, and the power of its age that it falls by."""

import math
from typing import NamedTuple

MEMORY = 0.7
"""Weight of the past in the smoothed loss, a cycle."""
LONG_MEMORY = 0.95
"""The same in the loss that is smoothed for longer."""
LEAST = 4
"""Cycles between two marks, at least: a smoothed loss needs some to follow."""


class Progress(NamedTuple):
    """A run's smoothed loss against its age, in steps: now, at a mark, and at the next one.

    The mark is at half of the age at most; its age is 0 until there is one. At the next one the age
    had doubled, and ``LEAST`` cycles had passed.
    """

    age: int
    recent: float
    lasting: float
    """Smoothed for longer."""
    earlier_age: int
    earlier: float
    later_age: int
    later: float


def begin(loss: float, age: int = 0) -> Progress:
    """A run that begins at a loss, as if at an age."""
    return Progress(age, loss, loss, 0, loss, age, loss)


def add(progress: Progress, loss: float, nt: int, memory: float = MEMORY) -> Progress:
    """After a cycle of nt steps whose mean loss is given; without memory nothing is smoothed."""
    age = progress.age + nt
    recent, lasting = (
        weight * before + (1 - weight) * loss if progress.age else loss
        for weight, before in ((memory, progress.recent), (LONG_MEMORY, progress.lasting))
    )
    if age // 2 < progress.later_age or age < progress.later_age + LEAST * nt:
        return progress._replace(age=age, recent=recent, lasting=lasting)
    return Progress(age, recent, lasting, progress.later_age, progress.later, age, recent)


def rate(progress: Progress) -> float:
    """a in loss ~ age^-a since the earlier mark; 1 until there is one.

    Where losses are not positive: 1 if the loss has fallen, 0 if it has not.

    >>> rate(Progress(40, 0.5, 0.5, earlier_age=10, earlier=1.0, later_age=20, later=0.7))
    0.5
    """
    now, then = progress.recent, progress.earlier
    if progress.earlier_age == 0:
        return 1.0
    if not (now > 0 and then > 0):
        return float(now < then)
    return math.log(then / now) / math.log(progress.age / progress.earlier_age)


def expected_at(progress: Progress, age: float) -> float:
    """The loss at an age if it goes on falling by its power of the age.

    Where losses are not positive: the smoothed loss as it is.

    >>> now = Progress(40, 0.5, 0.5, earlier_age=10, earlier=1.0, later_age=20, later=0.7)
    >>> expected_at(now, 160)
    0.25
    """
    if not (progress.recent > 0 and age > 0):
        return progress.recent
    return progress.recent * (progress.age / age) ** rate(progress)
