"""What a cycle has shown of a lane."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Seen(NamedTuple):
    """What a cycle has shown of a lane that ran, agreed between ranks.

    Attributes:
        losses: training losses, each before its step.
        checks: check losses.
        finite: whether parameters and buffers are finite.
    """

    losses: list[float]
    checks: list[float]
    finite: bool

    @property
    def fine(self) -> bool:
        """Whether the losses are finite as well."""
        return self.finite and all(map(math.isfinite, [*self.losses, *self.checks]))


def mean(losses: Sequence[float]) -> float:
    """Their mean, which may be infinite or NaN; ``statistics.fmean`` raises errors there.

    >>> mean([1.0, math.inf]), mean([math.inf, -math.inf])
    (inf, nan)
    """
    return sum(losses) / len(losses)
