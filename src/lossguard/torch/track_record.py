"""When does x go back to the fallback's own path? A rule over training losses.

Every loss before an optimizer step is on a minibatch that the parameters haven't seen, so what a
lane's training losses say of it is honest, and free (progressive validation: Blum, Kalai and
Langford, COLT 1999).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class TrackRecord(NamedTuple):
    """How x's training losses have compared with those of s, the fallback on its own path.

    Attributes:
        decay: by how much the past fades in a cycle.
    """

    decay: float

    def update(
        self, excess: float, kept: Sequence[float], own: Sequence[float]
    ) -> tuple[float, bool]:
        """The excess D after a cycle, and whether x goes back to s.

        A branch whose losses aren't finite is worse than one with finite ones.

        Args:
            excess: D before the cycle.
            kept: the nt losses of the branch that x would follow.
            own: those of s.

        >>> track_record(decay=0.5).update(-4.0, [2.0, 3.0], [1.0, 2.5])
        (-0.5, False)
        """
        now, total = self.decay * excess, sum(own)
        if not math.isfinite(total):
            return now, False
        now += sum(kept) - total
        return now, not -math.inf < now <= 0


def track_record(*, decay: float = 0.9) -> TrackRecord:
    """Go back where x's training losses of late sum up to more than the fallback's alone.

        D <- decay D + sum_t [F(x's branch, i+t) - F(s, i+t)],    over the nt steps of a cycle
        x <- s, D <- 0   if D > 0

    So D remembers about 1 / (1 - decay) cycles. While x is off the fallback's own path D <= 0: of
    late, its training losses were no higher than the fallback's alone, on the very minibatches. A
    learned lane leaves that path if the check and the cycle's training losses speak for it. Where a
    few hard examples make up the loss, a cycle's minibatches alone can't tell; a record can.

    Raises:
        ValueError: if decay is not at least 0 and below 1.

    >>> from lossguard.torch import LossGuard
    >>> import torch
    >>> w = torch.ones(1, requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=3.0), torch.optim.SGD([w], lr=0.1)
    >>> guard = LossGuard(learned, fallback, hedge=track_record(decay=0.9))
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1, got {decay!r}")
    return TrackRecord(decay)
