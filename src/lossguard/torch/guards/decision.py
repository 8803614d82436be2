"""What a cycle has shown of the lanes, and what a guard decided at its end."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

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
