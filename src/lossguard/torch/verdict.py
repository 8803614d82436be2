"""Line 16 of Algorithm 2, over lanes: which of those that were checked is kept."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lossguard.torch.criteria import Criterion, Differences
from lossguard.torch.decision import NEITHER


class Verdict(NamedTuple):
    """Which of the lanes that were checked is kept; lanes are rows, the m learned ones first.

    Attributes:
        row: the row that is kept, or -1.
        settled: whether the criterion has decided about every learned lane.
        best_fallback: the fallback's best row.
        learned_loss: mean of the losses of the best learned row.
        fallback_loss: the same of the fallback's.
        finite_learned: whether any learned row is finite.
        finite_fallback: whether the fallback's best row is.
    """

    row: int
    settled: bool
    best_fallback: int
    learned_loss: float
    fallback_loss: float
    finite_learned: bool
    finite_fallback: bool


def judge(
    criterion: Criterion,
    checks: Sequence[Sequence[float]],
    sound: Sequence[bool],
    m: int,
) -> Verdict:
    """Compare the lanes on n minibatches.

    Row m is the fallback's: a learned lane is kept if ``criterion`` says that it is better. Row
    m + 1, if there is one, is the fallback on its own path: it is kept if its mean is no higher
    than that of what the others came to. Lanes that aren't ``sound``, or whose losses aren't
    finite, can't win.

    Args:
        criterion: when a learned lane is better.
        checks: the losses that are compared [lanes, n]: training ones that count, then check ones.
        sound: whether each lane's parameters are finite.
        m: how many lanes are learned.

    >>> from lossguard.torch import mean_criterion
    >>> def row(checks, sound):
    ...     return judge(mean_criterion(), checks, sound, 1).row
    >>> row([[1.0], [2.0]], [True, True]), row([[2.0], [2.0]], [True, True])
    (0, 1)
    >>> row([[1.0], [math.nan]], [False, True]), row([[1.0], [2.0], [1.0]], [True, True, True])
    (-1, 2)
    """
    means = [sum(losses) / len(losses) for losses in checks]
    finite = [ok and math.isfinite(mean) for ok, mean in zip(sound, means, strict=True)]
    ranked = [mean if ok else math.inf for ok, mean in zip(finite, means, strict=True)]

    def gains(rows: Sequence[int], over: int) -> Differences:
        """By how much some rows are lower than another one; -1 or 1 where one is not finite."""
        n = len(checks[over])
        return np.array(
            [
                np.subtract(checks[over], checks[row])
                if finite[row] and finite[over]
                else np.full(n, 1.0 if finite[row] else -1.0)
                for row in rows
            ]
        )

    better, settled = criterion.test(gains(range(m), m))
    row = min((lane for lane in range(m) if better[lane]), key=ranked.__getitem__, default=m)
    best_fallback = m
    if len(checks) > m + 1:
        row = m + 1 if gains([m + 1], row).mean() >= 0 else row
        best_fallback = m + (ranked[m + 1] <= ranked[m])
    best_learned = min(range(m), key=ranked.__getitem__)
    return Verdict(
        row=row if finite[row] else NEITHER,
        settled=bool(settled.all()),
        best_fallback=best_fallback,
        learned_loss=means[best_learned],
        fallback_loss=means[best_fallback],
        finite_learned=any(finite[:m]),
        finite_fallback=finite[best_fallback],
    )


def follow_first(sound: Sequence[bool]) -> Verdict:
    """Keep the first lane, unchecked, if it is sound."""
    row = 0 if sound[0] else NEITHER
    return Verdict(row, True, 0, math.nan, math.nan, True, sound[0])
