"""Line 16 of Algorithm 2, over lanes: which of those that were checked is kept."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lossguard.torch.criteria import Criterion
from lossguard.torch.decision import NOBODY


class Verdict(NamedTuple):
    """Which of the lanes that were checked is kept; lanes are rows, the m learned ones first.

    Attributes:
        row: the row that is kept, or -1.
        settled: whether the criterion has decided about every learned lane.
        best_fallback: the fallback's best row.
        learned_loss: mean check loss of the best learned row.
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
    criterion: Criterion, checks: Sequence[Sequence[float]], sound: Sequence[bool], m: int
) -> Verdict:
    """Compare the lanes on n check minibatches.

    The fallback's lanes are compared by their means (s wins ties), and each learned lane with the
    better of them by the criterion. Lanes that aren't ``sound``, or whose losses aren't finite,
    can't win.

    Args:
        criterion: when a learned lane is better.
        checks: check losses [lanes, n].
        sound: whether each lane's parameters are finite.
        m: how many lanes are learned.

    >>> from lossguard.torch import mean_criterion
    >>> judge(mean_criterion(), [[1.0], [2.0]], [True, True], 1).row
    0
    >>> judge(mean_criterion(), [[2.0], [2.0]], [True, True], 1).row
    1
    >>> judge(mean_criterion(), [[1.0], [math.nan]], [False, True], 1).row
    -1
    """
    means = [sum(losses) / len(losses) for losses in checks]
    finite = [ok and math.isfinite(mean) for ok, mean in zip(sound, means, strict=True)]
    ranked = [mean if ok else math.inf for ok, mean in zip(finite, means, strict=True)]
    best_fallback = min(reversed(range(m, len(means))), key=ranked.__getitem__)  # s comes last
    best_learned = min(range(m), key=ranked.__getitem__)

    d = np.empty((m, len(checks[0])))
    for lane in range(m):
        if not finite[lane]:
            d[lane] = -1
        elif not finite[best_fallback]:
            d[lane] = 1
        else:
            d[lane] = np.subtract(checks[best_fallback], checks[lane])
    better, settled = criterion.test(d)
    won = [lane for lane in range(m) if better[lane]]
    otherwise = best_fallback if finite[best_fallback] else NOBODY
    return Verdict(
        row=min(won, key=ranked.__getitem__) if won else otherwise,
        settled=bool(settled.all()),
        best_fallback=best_fallback,
        learned_loss=means[best_learned],
        fallback_loss=means[best_fallback],
        finite_learned=any(finite[:m]),
        finite_fallback=finite[best_fallback],
    )


def follow_first(sound: Sequence[bool]) -> Verdict:
    """Keep the first lane, unchecked, if it is sound."""
    row = 0 if sound[0] else NOBODY
    return Verdict(row, True, 0, math.nan, math.nan, True, sound[0])
