"""Lanes on paths of their own: their records, which of them leads, and which are still running.

d    a lane's mean loss in a cycle
D    its record: the discounted sum of d over all cycles
"""

import math
from collections.abc import Mapping, Sequence

from lossguard.torch.lane import Lane
from lossguard.torch.ratchet import Best
from lossguard.torch.weights import Copy, Weights


class Paths:
    """Lanes that each go on from where they are.

    Attributes:
        all: the learned ones, and the fallback.
        checks: whether they take check minibatches, by which they are compared then.
        best, watched, aside: none, as there is no ratchet, and the model always holds x.
        records: D of each; infinite of one that has stopped.
        kept: the number of the one that is followed: x is there.
        away: cycles since each was followed.
        begun: whether a cycle is done. Until then x may be set from outside, for all of them.
    """

    best: Best | None = None
    watched: Best | None = None
    aside: Copy | None = None

    def __init__(self, lanes: list[Lane], *, checks: bool) -> None:
        self.all = lanes
        self.checks = checks
        self.records = [0.0] * len(lanes)
        self.kept = len(lanes) - 1
        self.away = [0] * len(lanes)
        self.begun = False

    def running(self, patience: int | None) -> list[int]:
        """The numbers of those that haven't been away for so long; of the fallback always."""
        *learned, last = range(len(self.all))
        going_on = [k for k in learned if self.records[k] < math.inf]
        return [k for k in going_on if patience is None or self.away[k] < patience] + [last]

    def checked(self, active: Sequence[int]) -> list[int]:
        """All of them, if there is something to compare, or none."""
        return list(active) if self.checks and len(active) > 1 else []

    @property
    def given(self) -> int:
        """The number of the lane that the model has got."""
        return self.kept

    def begins_at_x(self, number: int) -> bool:
        """Whether a lane starts from x: the followed one is there, and may have been set there."""
        return not self.begun or number == self.kept

    def record(
        self, losses: Mapping[int, Sequence[float]], sound: Mapping[int, bool], decay: float
    ) -> tuple[dict[int, float], dict[int, bool]]:
        """Take a cycle down; d of each lane that ran, and whether it goes on.

        A minibatch on which the fallback's loss isn't finite counts for none; if none counts, d is
        NaN. A learned lane has to be finite on the others, and so has every lane itself.

        Args:
            losses: of each, on the same minibatches.
            sound: whether its parameters and buffers are finite.
            decay: by how much the past fades.
        """
        last = len(self.all) - 1
        counted = [t for t, loss in enumerate(losses[last]) if math.isfinite(loss)]
        d = {k: sum(row[t] / len(counted) for t in counted) for k, row in losses.items()}
        fit = {k: sound[k] and (k == last or math.isfinite(d[k])) for k in d}
        self.records = [
            decay * record + d[k] if fit.get(k) else math.inf
            for k, record in enumerate(self.records)
        ]
        self.begun = True
        if any(fit.values()):  # ties go to the fallback, then to the first
            self.kept = min((last, *range(last)), key=self.records.__getitem__)
            self.away = [0 if k == self.kept else away + 1 for k, away in enumerate(self.away)]
        return d if counted else dict.fromkeys(d, math.nan), fit

    def settle(
        self, fit: Mapping[int, bool], broken: Mapping[int, bool], x: Weights
    ) -> dict[int, bool]:
        """Begin lanes anew that aren't finite, at x, or their memories; which ones that were."""
        leading = self.records[self.kept] if any(fit.values()) else 0.0
        for number, fine in fit.items():
            lane = self.all[number]
            if not fine:
                x.copy_to(lane.copy)
                lane.take_scale(self.all[self.kept])
                self.records[number] = leading
            if broken[number] or not fine:
                lane.forget()
        return {number: broken[number] or not fine for number, fine in fit.items()}
