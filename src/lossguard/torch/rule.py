"""What ``Rewind`` decides, from losses alone: numbers on the host, no tensors.

Letters: T calls, B = window / 4 losses a block.
"""

import math
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

from lossguard.torch.alarm import Alarm, Audit
from lossguard.validation import check_count, check_fraction, check_real

IN_A_ROW = 3
"""Returns to one snapshot. If they don't help, its losses are no measure any more."""
SOON = 10
"""Windows. After a return so soon after another one the scale stays lower."""
DEEPEST = 5
"""How many times ``factor`` lowers it for good at most: data may be broken for long, and heal."""

OPTIONS = ("window", "block", "rise", "alarm", "audits", "_rho", "_factor")


class Outcome(NamedTuple):
    """What some losses lead to.

    Attributes:
        promotes: whether the candidate becomes trusted.
        ends: whether a block has ended, so that there may be another candidate.
        unanswered: whether there was an alarm at which the run can't go back.
        late: None; or, if the run is to go back, steps since the alarm.
    """

    promotes: bool
    ends: bool
    unanswered: bool
    late: int | None


class Rule:
    """When to go back, and at which scale to go on.

    Attributes:
        calls, returns, thrown, skipped: T, returns, steps thrown away, losses that weren't finite.
        unread: calls whose losses it hasn't heard yet.
        age, candidate_age: steps since the trusted snapshot and since the candidate.
        pending: whether there is a candidate.
        in_a_row, last_return: returns to the trusted snapshot, and the call of the last one.
        ramp, cap: steps since the last alarm, and what the scale rises to.
    """

    def __init__(self, window: int, rho: float, factor: float, rise: float) -> None:
        if check_count("window", window, least=64) % 8:
            raise ValueError(f"window must be a multiple of 8, got {window!r}")
        self.window, self.block = int(window), int(window) // 4
        self._rho, rise = (
            check_real(name, value, "at least 0 and below 1", lambda v: 0 <= v < 1)
            for name, value in (("rho", rho), ("rise", rise))
        )
        self._factor = check_fraction("factor", factor)
        self.alarm, self.audits = Alarm(self.block, rise), Audit(rise)
        self.calls = self.returns = self.thrown = self.skipped = self.unread = 0
        self.age = self.candidate_age = self.in_a_row = self.last_return = 0
        self.pending = False
        self.ramp, self.cap = self.block, 1.0

    @property
    def scale(self) -> float:
        """What rates are multiplied by in the next step."""
        risen = min(1.0, (self.ramp + self.unread) / self.block)
        return self.cap * (self._factor + (1 - self._factor) * risen)

    @property
    def allowance(self) -> int:
        """Steps that may be thrown away in so many calls."""
        return self.window + math.floor(self._rho * (1 - 1e-6) * self.calls)

    def numbers(self) -> dict[str, dict[str, Any]]:
        """All that it knows, and none of its options."""
        return {
            name: {key: copy(value) for key, value in vars(part).items() if key not in OPTIONS}
            for name, part in self._parts().items()
        }

    def load(self, numbers: dict[str, dict[str, Any]]) -> None:
        """Know what ``numbers`` returned."""
        for name, part in self._parts().items():
            vars(part).update({key: copy(value) for key, value in numbers[name].items()})

    def _parts(self) -> dict[str, Any]:
        return {"rule": self, "alarm": self.alarm, "audits": self.audits}

    def can_always_return(self, steps: int) -> bool:
        """Whether the run may go back from wherever it is after so many steps more."""
        spare = self.allowance - self.thrown - self.age
        return spare >= steps and self.in_a_row < IN_A_ROW

    def hear(self, losses: Sequence[float]) -> Outcome:
        """The losses since the last time; one that isn't finite is of a step that wasn't taken."""
        self.unread = 0
        promotes = ends = unanswered = False
        for i, loss in enumerate(losses):
            sound = math.isfinite(loss)
            self.alarm.hear(loss, sound)
            if self.alarm.rings:
                late = sum(map(math.isfinite, losses[i:]))
                if self.may_return(late):
                    return Outcome(promotes, False, unanswered, late)
                self.forget()
                unanswered = True
            self.skipped += not sound
            if sound:
                self.age, self.candidate_age = self.age + 1, self.candidate_age + 1
                self.ramp += 1
                self.alarm.keep(loss)
            if self.alarm.ends:
                promotes, ends = self._promote(), True
        return Outcome(promotes, ends, unanswered, None)

    def may_return(self, late: int) -> bool:
        """Whether the budget allows a return that throws away ``late`` steps more than ``age``."""
        affordable = self.thrown + self.age + late <= self.allowance
        return affordable and self.in_a_row < IN_A_ROW

    def forget(self) -> None:
        """After an alarm without a return: begin another reference, at a lower scale."""
        self._begin_again(forget=True)
        self.in_a_row = 0

    def go_back(self, late: int, lower: bool) -> tuple[int, bool]:
        """Account for a return; ``lower`` the cap if it comes soon after another one.

        Returns:
            The steps that it throws away, and whether it comes soon after another one.
        """
        thrown = self.age + late
        self._begin_again(forget=False)
        soon = self.returns > 0 and self.calls - self.last_return <= SOON * self.window
        if soon and lower:
            self.cap = max(self.cap * self._factor, self._factor**DEEPEST)
        self.age, self.last_return = 0, self.calls
        self.thrown += thrown
        self.returns += 1
        self.in_a_row += 1
        return thrown, soon

    def _promote(self) -> bool:
        """At the end of a block: the candidate's probation is over."""
        promotes = self.alarm.is_calm and self.pending
        if promotes:
            self.age, self.in_a_row, self.pending = self.candidate_age, 0, False
        self.alarm.end_block()
        return promotes

    def _begin_again(self, forget: bool) -> None:
        self.alarm.quiet(forget)
        self.audits.quiet(forget)
        self.pending, self.ramp = False, 0
