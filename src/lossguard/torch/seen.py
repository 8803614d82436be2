"""What a cycle has shown of a lane."""

import math
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
