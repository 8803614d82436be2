"""When does a guard follow the fallback's own path? A rule over training losses.

Every loss before an optimizer step is on a minibatch that the parameters haven't seen, so what a
lane's training losses say of it is honest, and free (progressive validation: Blum, Kalai and
Langford, COLT 1999).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from lossguard.validation import check_decay, check_share


class Excess(NamedTuple):
    """By how much x's training losses were higher than those of s since it left that path.

    Attributes:
        total: D, the discounted sum over all cycles.
        worst: W, the largest of its terms, at least 0.
        recent: R, the same sum with the shortest memory; s is given out where it is above 0.
        cycles: a, since x left.
    """

    total: float = 0.0
    worst: float = 0.0
    recent: float = 0.0
    cycles: int = 0


class TrackRecord(NamedTuple):
    """How x's training losses are compared with those of s, the fallback on its own path.

    Attributes:
        decay: by how much the past fades in a cycle, at first.
        share: of the cycles since x left that are remembered in time.
    """

    decay: float
    share: float

    def update(
        self, excess: Excess, kept: Sequence[float], own: Sequence[float], on_own: bool
    ) -> tuple[Excess, bool]:
        """The excess after a cycle, and whether x goes back to s, or doesn't leave it.

        A branch whose losses aren't finite is worse than one with finite ones.

        Args:
            excess: before the cycle.
            kept: the nt losses of the branch that x would follow.
            own: those of s.
            on_own: whether x lies on the path of s.

        >>> before = Excess(total=1.0, worst=2.0, recent=1.0)
        >>> track_record(decay=0.5).update(before, [2.0, 3.0], [1.0, 2.5], False)
        (Excess(total=2.0, worst=1.5, recent=2.0, cycles=1), True)
        """
        known = math.isfinite(sum(own))
        d = sum(kept) - sum(own) if known else 0.0
        a = excess.cycles + 1
        decay = max(self.decay, 1 - 1 / max(self.share * a, 1))
        total = decay * excess.total + d
        worst = max(d, decay * excess.worst)
        recent = self.decay * excess.recent + d if known else 0.0
        fine = math.isfinite(total) and total <= (0 if on_own else worst)
        return Excess(total, worst, recent, a), known and not fine


def track_record(*, decay: float = 0.9, share: float = 0.1) -> TrackRecord:
    """Follow the fallback alone while x's recent training losses are higher, or go back to it.

    In cycle a since x left the path of s:

        rho <- max(decay, 1 - 1 / (share a))
        d <- sum_t [F(x's branch, i+t) - F(s, i+t)],    over the nt steps of a cycle
        R <- decay R + d
        D <- rho D + d;  W <- max(rho W, d)
        x <- s, R, D, W, a <- 0   if D > W;     the guard gives out s   if R > 0,   else x

    Giving out s forfeits nothing, as x goes on beside it, so that it needs no patience: R remembers
    about 1 / (1 - decay) cycles. In every run, at any time, the losses that the guard reports sum
    up to no more than those of s, and no more than those of x.

    Going back forfeits what was gained, so that a long lead is not given up for a few cycles: D
    remembers in time the last ``share`` of those since x left. It is never given up for one, as s
    must be ahead even without the cycle that was the worst for x. A learned lane leaves the
    fallback's own path if the check speaks for it and d <= 0. Where a few hard examples make up the
    loss, a cycle's minibatches alone can't tell; a record can.

    Args:
        decay: of R, and the least that rho may be.
        share: of the cycles since x left the path of s, which D remembers in time; 0: D is R.

    Raises:
        ValueError: if decay is not above 0 and below 1, or share not at least 0 and below 1.

    >>> from lossguard.torch import LossGuard
    >>> import torch
    >>> w = torch.ones(1, requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=3.0), torch.optim.SGD([w], lr=0.1)
    >>> guard = LossGuard(learned, fallback, hedge=track_record(decay=0.9))
    """
    return TrackRecord(check_decay(decay), check_share(share))
