"""Whether a return has helped: losses after it are compared with those before it."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

LOOK = 8
"""Losses between two looks."""
LONGEST = 64
"""Losses after which it is over."""
EARLY, LATE = 4.0, 3.0
"""Standard errors that decide at a look, and at the last."""
LOST = -1.0
"""Those below which it isn't worth going on rise from here to ``LATE``."""


class Trial:
    """Compares losses with the last ones ``before``.

    d is the difference of the means, before less after, of losses no higher than the highest finite
    one; its error is ``deviation`` times sqrt(1/n + 1/m), of a deviation that is at least that of
    the losses after the return.

    >>> trial = Trial([2.0, 2.1] * 12, 0.1)
    >>> [trial.hear(1.0 + 0.1 * (k % 2)) for k in range(8)][-1]
    True
    """

    def __init__(self, before: Sequence[float], deviation: float, longest: int = LONGEST) -> None:
        """``longest``: losses after which it is over, if that has to be sooner."""
        self.before, self.deviation, self.longest = list(before), deviation, longest
        self.since: list[float] = []

    def hear(self, loss: float) -> bool | None:
        """Whether the return stays; None if that isn't decided yet."""
        self.since.append(loss)
        heard = len(self.since)
        if heard % LOOK:
            return None
        score = self._score()
        least = LOST + (LATE - LOST) * heard / LONGEST
        if score < least:
            return False
        if score > EARLY or heard == LONGEST:
            return True
        return False if heard >= self.longest else None

    @property
    def until_look(self) -> int:
        """Losses until the next look."""
        return LOOK - len(self.since) % LOOK

    def numbers(self) -> dict[str, Any]:
        return {**vars(self), "since": [*self.since]}

    def load(self, numbers: dict[str, Any]) -> None:
        vars(self).update({name: numbers[name] for name in vars(self)})
        self.since = list(self.since)

    def _score(self) -> float:
        found = [loss for loss in (*self.before, *self.since) if math.isfinite(loss)]
        worst = max(found, default=0.0)
        worst += abs(worst)  # of one that isn't finite
        before, since = (
            [loss if math.isfinite(loss) else worst for loss in losses]
            for losses in (self.before, self.since)
        )
        deviation = 0.0 if math.isnan(self.deviation) else self.deviation
        deviation = max(deviation, statistics.stdev(since), 1e-30)
        error = deviation * math.sqrt(1 / len(since) + 1 / len(before))
        return (statistics.fmean(before) - statistics.fmean(since)) / error
