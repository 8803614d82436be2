"""What losses tell: a cycle's decision, a trial of two lanes, and how fast a run gets better.

The rules of trials and progress are those of ``lossguard/guards/trial.py`` and ``progress.py``.
"""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple, Self

from lossguard.rules import BETWEEN, DIVERGED, LONG_MEMORY, LOOKS, MARGIN, MEMORY

LEARNED, FALLBACK, OWN, NEITHER = 0, 1, 2, -1
"""``Decision.winner``: the learned optimizer's lane, the fallback's from x, the fallback's own; or
x stayed, or went back."""


class Seen(NamedTuple):
    """What a cycle has shown of a lane that ran, agreed between ranks."""

    losses: list[float]
    """Of training, each before its step."""
    checks: list[float]
    finite: bool
    """Whether parameters and buffers are."""

    @property
    def told(self) -> list[float]:
        """The losses of training; all of them are infinite if the cycle ended not finite."""
        return self.losses if self.finite else [math.inf] * len(self.losses)


class Decision(NamedTuple):
    """A plain record of one cycle; a list of them is a table for pandas or polars.

    Attributes:
        used_learned: nt flags: whether each step of the lane that ``losses`` are of was learned.
        losses: nt training losses, each before its step. Of which lane, the guard says. Infinite
            where all of these steps were undone.
        winner: the lane that the model has after the cycle: 0 learned, 1 fallback, 2 the fallback
            by itself, -1 where x stayed or went back (never with ``Recommended``);
            with ``BestOf`` the optimizer's number.
        gradients: gradients evaluated, in all lanes.
        learned_updates: steps of learned optimizers, kept or not.
        forwards: losses evaluated without a gradient, in all lanes.
        learned_loss: the mean loss by which the learned lane was compared; NaN if none was.
        fallback_loss: the same of the fallback's, on the same minibatches.
        jumped: whether the model's parameters were replaced by another lane's, or an earlier
            point: a moving average of weights should begin again there.
    """

    used_learned: list[bool]
    losses: list[float]
    winner: int
    gradients: int
    learned_updates: int
    forwards: int = 0
    learned_loss: float = math.nan
    fallback_loss: float = math.nan
    jumped: bool = False

    def price(self, u: float = 0.0) -> float:
        """Gradients + forward passes / 3 + learned updates times u: what was spent, in gradients.

        Args:
            u: the measured cost of one learned update in gradients of the task; 0: not counted.
        """
        return self.gradients + self.forwards / 3 + u * self.learned_updates


def mean(losses: Sequence[float]) -> float:
    """Their mean, which may be infinite or NaN; ``statistics.fmean`` raises errors there.

    >>> mean([1.0, math.inf]), mean([math.inf, -math.inf])
    (inf, nan)
    """
    return sum(losses) / len(losses)


def any_finite(losses: Sequence[float]) -> bool:
    """Whether one of them is."""
    return any(map(math.isfinite, losses))


def breaks(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Whether a lane has no finite loss in a cycle in which another one has."""
    return not any_finite(losses) and any_finite(others)


def finite_mean(losses: Sequence[float]) -> float:
    """The mean of those that are finite; NaN if none is.

    >>> finite_mean([1.0, math.inf, 3.0]), finite_mean([math.inf])
    (2.0, nan)
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    return mean(finite) if finite else math.nan


def bounded(losses: Sequence[float]) -> list[float]:
    """Losses that can be added up: one that isn't finite is a huge one.

    >>> a, b = bounded([math.nan, 1.0])
    >>> 1e300 < a < math.inf, b
    (True, 1.0)
    """
    most = sys.float_info.max / 2**23
    return [max(-most, min(loss, most)) if math.isfinite(loss) else most for loss in losses]


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
