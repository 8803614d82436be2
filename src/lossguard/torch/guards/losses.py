"""What losses tell: whether a challenger is better than the leader, and how fast a run gets better.

The rules are those of ``lossguard/guards/trial.py`` and ``progress.py``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

from lossguard.rules import BETWEEN, DIVERGED, LONG_MEMORY, LOOKS, MARGIN, MEMORY
from lossguard.torch.guards.decision import bounded, finite_mean, mean


class Trial(NamedTuple):
    """Challenger against leader, from the same point and on the same minibatches.

    >>> trial = Trial(length=1, bound=2.0).after([3.0, 1.0, 0.9, 0.8], [3.0, 2.5, 2.5, 2.5])
    >>> trial.pairs, trial.outcome([0.8], [2.5])
    (2, (True, False))
    """

    length: int = 0
    """How many cycles it takes at most; 0: there is no trial."""
    bound: float = 0.0
    """What the challenger has to be below; NaN until the first loss of a run is known."""
    cycles: int = 0
    pairs: int = 0
    """Of the paired differences, challenger - leader, that are counted; their sum, and norm."""
    total: float = 0.0
    size: float = 0.0

    def after(self, challenger: Sequence[float], leader: Sequence[float]) -> Self:
        """After a cycle. What counts are the differences in the second half of the trial.

        Until the middle those since its first half cycle count: they can end it early. At the start
        of a run the bound is 0.9 of the first loss (|loss| / 10 below it).
        """
        challenger, leader = bounded(challenger), bounded(leader)
        bound = leader[0] - abs(leader[0]) / 10 if math.isnan(self.bound) else self.bound
        middle = self.cycles == self.length // 2
        pairs, total, size = (0, 0.0, 0.0) if middle else (self.pairs, self.total, self.size)
        first = len(leader) // 2 if self.cycles == 0 else 0
        d = [c - f for c, f in zip(challenger[first:], leader[first:], strict=True)]
        return self._replace(
            bound=bound,
            cycles=self.cycles + 1,
            pairs=pairs + len(d),
            total=total + sum(d),
            size=math.hypot(size, *d),
        )

    def outcome(self, challenger: Sequence[float], leader: Sequence[float]) -> tuple[bool, bool]:
        """Whether the challenger has won, and whether it has lost; neither: the trial goes on.

        With m and e the mean of the differences and its standard error: it has lost if m > 3 e at
        any time; it has won at the end if its last losses are below the bound, and m < -3 e; or if
        they are, and below the leader's one by one, which have risen to ten times that: differences
        that grow with each step of a leader that diverges have a large e.
        """
        n = max(self.pairs, 2)
        m = self.total / n
        part = m / (self.size or 1)
        error = self.size * math.sqrt(max(1 / n - part * part, 0) / (n - 1))
        half = len(leader) // 2
        last, against = bounded(challenger[half:]), bounded(leader[half:])
        risen = mean(against) > self.bound + DIVERGED * abs(self.bound)
        ahead = risen and all(c < f for c, f in zip(last, against, strict=True))
        over = self.cycles >= self.length
        won = (
            over and (m < -MARGIN * error or ahead) and finite_mean(challenger[half:]) < self.bound
        )
        return won, not won and (over or not m <= MARGIN * error)


NONE = Trial()
UNBOUNDED = Trial(LOOKS, math.inf)
"""Which the challenger wins by its losses alone."""


class Progress(NamedTuple):
    """A run's smoothed loss against its age, in steps: now, at a mark, and at the next one.

    The mark is at half of the age at most; its age is 0 until there is one. At the next one the age
    had doubled, and ``BETWEEN`` cycles had passed.
    """

    age: int
    recent: float
    """NaN before the first."""
    lasting: float
    """Smoothed for longer."""
    earlier_age: int
    earlier: float
    later_age: int
    later: float

    @classmethod
    def begun(cls, loss: float, age: int = 0) -> Self:
        """A run that begins at a loss, as if at an age."""
        return cls(age, loss, loss, 0, loss, age, loss)

    def after(self, loss: float, nt: int, memory: float = MEMORY) -> Self:
        """After a cycle of nt steps of that mean loss; without memory nothing is smoothed.

        Where the loss is NaN nothing was seen, and the run is as it was.
        """
        if math.isnan(loss):
            return self
        age = self.age + nt
        recent, lasting = (
            weight * before + (1 - weight) * loss if self.age else loss
            for weight, before in ((memory, self.recent), (LONG_MEMORY, self.lasting))
        )
        now = self._replace(age=age, recent=recent, lasting=lasting)
        if age // 2 < self.later_age or age < self.later_age + BETWEEN * nt:
            return now
        return now._replace(
            earlier_age=self.later_age, earlier=self.later, later_age=age, later=recent
        )

    @property
    def rate(self) -> float:
        """a in loss ~ age^-a since the earlier mark; 1 until there is one.

        Where losses are not positive: 1 if the loss has fallen, 0 if it has not.

        >>> Progress(40, 0.5, 0.5, earlier_age=10, earlier=1.0, later_age=20, later=0.7).rate
        0.5
        """
        if self.earlier_age == 0:
            return 1.0
        if not (self.recent > 0 and self.earlier > 0):
            return float(self.recent < self.earlier)
        fallen = math.log(self.earlier) - math.log(self.recent)
        return fallen / math.log(self.age / self.earlier_age)

    def expected_at(self, age: float) -> float:
        """The loss at an age if it goes on falling by its power of the age.

        Where losses are not positive: the smoothed loss as it is.
        """
        if not (self.recent > 0 and age > 0):
            return self.recent
        try:
            return self.recent * (self.age / age) ** self.rate
        except OverflowError:
            return math.inf
