"""A trial: is a challenger better than the leader, from the same point, on the same minibatches?"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from lossguard.torch.decision import mean

MARGIN = 3.0
"""Standard errors by which a challenger has to be better, or worse, for the trial to end so."""


class Trial(NamedTuple):
    """A trial under way; with the number, the sum and the squares of the paired differences."""

    length: int
    """How many cycles it takes at most; 0: there is no trial."""
    bound: float
    """What the challenger has to be below; NaN until the first loss of a run is known."""
    cycles: int = 0
    pairs: int = 0
    total: float = 0.0
    squares: float = 0.0


NONE = Trial(0, 0.0)


def add(trial: Trial, challenger: Sequence[float], leader: Sequence[float]) -> Trial:
    """After a cycle. What counts are the differences in the second half of the trial.

    Until the middle those since its first half cycle count: they can end it early. At the start of
    a run the bound is 0.9 of the first loss (|loss| / 10 below it).
    """
    if math.isnan(trial.bound):
        trial = trial._replace(bound=leader[0] - abs(leader[0]) / 10)
    if trial.cycles == trial.length // 2:
        trial = trial._replace(pairs=0, total=0.0, squares=0.0)
    first = len(leader) // 2 if trial.cycles == 0 else 0
    d = [c - f for c, f in zip(challenger[first:], leader[first:], strict=True)]
    return trial._replace(
        cycles=trial.cycles + 1,
        pairs=trial.pairs + len(d),
        total=trial.total + sum(d),
        squares=trial.squares + sum(one * one for one in d),
    )


def outcome(trial: Trial, challenger: Sequence[float]) -> tuple[bool, bool]:
    """Whether the challenger has won, and whether it has lost; neither: the trial goes on.

    With m and e the mean of the differences and its standard error: it has lost if m > 3 e at any
    time; it has won at the end if m < -3 e and its last losses are below the bound.

    >>> outcome(add(Trial(length=1, bound=2.0), [3.0, 1.0, 0.9, 0.8], [3.0, 2.5, 2.5, 2.5]), [0.8])
    (True, False)
    """
    n = max(trial.pairs, 2)
    m = trial.total / n
    error = math.sqrt(max(trial.squares / n - m * m, 0) / (n - 1))
    last = mean(challenger[len(challenger) // 2 :])
    over = trial.cycles >= trial.length
    won = over and m < -MARGIN * error and last < trial.bound
    return won, not won and (over or not m <= MARGIN * error)
