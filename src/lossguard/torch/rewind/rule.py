"""What ``Rewind`` decides, from losses alone: the rule of ``lossguard.rewind``, in plain numbers.

Letters: T calls, B = window / 4 losses a block. Of a block, m and q are the median and the 0.95
quantile; r is the lowest m + 2 (q - m) of all blocks that ended in calm, of which the first one's
last quarter is one until another has; a is the level at the start, the median of the first B // 8
losses.
"""

import math
from collections.abc import Sequence
from copy import copy
from operator import attrgetter
from typing import Any

from lossguard.rules import DEEPEST, IN_A_ROW, SOON
from lossguard.validation import check_count, check_fraction, check_part

NUMBERS = (
    "calls", "returns", "thrown", "skipped", "age", "candidate_age", "pending", "losses", "audit",
    "in_a_row", "last_return", "ramp", "cap", "alarm.start", "alarm.reference", "alarm.early",
    "alarm.score", "audits.start", "audits.reference", "audits.score",
)  # fmt: skip
"""All that a rule knows, and none of its options."""


class Alarm:
    """Counts values above r + rise * max(0, a - r), of a reference r and the level a at the start.

    The score goes up by 1 with each of them, and down by 1, never below 0, with every other value.

    >>> alarm = Alarm(limit=2, rise=0.05)
    >>> alarm.start, alarm.reference = 3.0, 1.0
    >>> [alarm.hear(value) for value in (1.1, 1.2, math.nan)], alarm.rings
    ([False, True, True], True)
    """

    def __init__(self, limit: int, rise: float) -> None:
        self.limit, self.rise = limit, rise
        self.start, self.reference, self.score = math.nan, math.inf, 0
        self.early = math.inf  # a second reference, for a while

    @property
    def rings(self) -> bool:
        return self.score >= self.limit

    def hear(self, value: float) -> bool:
        """Whether it counts, as one that is NaN does."""
        reference = min(self.reference, self.early)
        progress = self.start - reference
        margin = self.rise * progress if progress > 0 else 0.0
        counts = not value <= reference + margin
        self.score = max(0, self.score + (1 if counts else -1))
        return counts


class Rule:
    """When to go back, and at which scale to go on.

    Attributes:
        calls: T, those whose losses it has heard.
        returns, thrown, skipped: returns, steps thrown away, steps that were not finite.
        age, candidate_age: steps since the trusted snapshot and since the candidate.
        pending: whether there is a candidate.
        losses, audit: those of the present block, and the last audit.
        in_a_row, last_return: returns to the trusted snapshot, and the call of the last one.
        ramp, cap: steps since the last alarm, and what the scale rises to.
        idle: whether there was an alarm, of those heard last, at a loss or gradients that aren't
            finite, where no step was taken since the snapshot: the minibatches are to blame.
    """

    def __init__(self, window: int, rho: float, factor: float, rise: float, every: int) -> None:
        if check_count("window", window, least=64) % 8:
            raise ValueError(f"window must be a multiple of 8, got {window!r}")
        self.window, self.block = int(window), int(window) // 4
        self.every = check_count("every", every)
        if self.block % every:
            raise ValueError(f"every must divide window / 4 = {self.block}, got {every}")
        self._rho, rise = check_part("rho", rho), check_part("rise", rise)
        self._factor = check_fraction("factor", factor)
        self.alarm = Alarm(self.block // 2, rise)
        # Held data have less noise than minibatches, so few decide; between steps they have some.
        self.audits = Alarm(4, 4 * rise)
        self.calls = self.returns = self.thrown = self.skipped = 0
        self.age = self.candidate_age = self.in_a_row = self.last_return = 0
        self.losses: list[float] = []
        self.pending, self.idle, self.audit = False, False, math.nan
        self.ramp, self.cap = self.block, 1.0

    def scale(self, unheard: int) -> float:
        """What rates are multiplied by in the next step, after steps that it hasn't heard of."""
        risen = min(1.0, (self.ramp + unheard) / self.block)
        return self.cap * (self._factor + (1 - self._factor) * risen)

    def numbers(self) -> dict[str, Any]:
        return {name: copy(attrgetter(name)(self)) for name in NUMBERS}

    def load(self, numbers: dict[str, Any]) -> None:
        """Know what ``numbers`` returned; all of it, or nothing if it lacks something."""
        found = [copy(numbers[name]) for name in NUMBERS]
        for name, value in zip(NUMBERS, found, strict=True):
            owner, _, last = name.rpartition(".")
            setattr(getattr(self, owner) if owner else self, last, value)

    @property
    def can_always_return(self) -> bool:
        """Whether the run may go back from wherever it is at the next read."""
        return self.may_return(self.every)

    def may_end(self, unheard: int) -> bool:
        """Whether so many more losses may end the block, and the run may go back then."""
        return len(self.losses) + unheard >= self.block and self.can_always_return

    def hear(
        self, losses: Sequence[float], skipped: Sequence[bool], *, undone: bool = False
    ) -> tuple[bool, bool, bool, int | None]:
        """The losses since the last time, and of which steps that weren't taken.

        Such a step had gradients that weren't finite; or, the last one, was ``undone`` because the
        model was not finite after it.

        Returns:
            Whether the candidate becomes trusted; whether a block has ended, so that there may be
            another; whether there was an alarm at which the run can't go back; and, if it is to go
            back, steps since the alarm.
        """
        self.calls, self.idle = self.calls + len(losses), False
        promotes = ends = unanswered = False
        for i, (loss, skips) in enumerate(zip(losses, skipped, strict=True)):
            sound = math.isfinite(loss) and not skips
            self.alarm.hear(loss if sound else math.nan)
            if self.alarm.rings:
                late = skipped[i:].count(False)
                of_step = undone and i == len(losses) - 1  # its gradients were finite
                spoilt = not math.isfinite(loss) or (skips and not of_step)
                if self.age == 0 and spoilt:
                    self.alarm.score, self.idle = 0, True
                elif self.may_return(late):
                    self.skipped += skipped[i + 1 :].count(True)
                    return promotes, False, unanswered, late
                else:
                    self.forget()
                    unanswered = True
            self.skipped += skips
            if not skips:
                self.age, self.candidate_age = self.age + 1, self.candidate_age + 1
                self.ramp += 1
            if sound:
                self.losses.append(loss)
            if len(self.losses) == self.block:
                promotes, ends = self._end_block(), True
        return promotes, ends, unanswered, None

    def hear_audit(self, loss: float) -> bool:
        """The loss of a candidate on held data; whether it is too high for one."""
        if math.isnan(self.audits.start):
            self.audits.start = loss
        self.audit, self.pending = loss, False
        return self.audits.hear(loss)

    def may_return(self, late: int) -> bool:
        """Whether the budget allows a return that throws away ``late`` steps more than ``age``."""
        allowance = self.window + math.floor(self._rho * (1 - 1e-6) * self.calls)
        affordable = self.thrown + self.age + late <= allowance
        return affordable and self.in_a_row < IN_A_ROW

    def forget(self) -> None:
        """After an alarm without a return: begin another reference, at a lower scale."""
        self._begin_again()
        self.alarm.reference = self.alarm.early = self.audits.reference = math.inf
        self.in_a_row = 0

    def go_back(self, late: int) -> int:
        """Account for a return, which lowers the cap if it comes soon after another one.

        Returns:
            The steps that it throws away.
        """
        thrown = self.age + late
        self._begin_again()
        if self.returns > 0 and self.calls - self.last_return <= SOON * self.window:
            self.cap = max(self.cap * self._factor, self._factor**DEEPEST)
        self.age, self.last_return = 0, self.calls
        self.thrown += thrown
        self.returns += 1
        self.in_a_row += 1
        return thrown

    def _end_block(self) -> bool:
        """Whether a candidate's probation is over. A calm block may become the reference."""
        alarm, block, losses, self.losses = self.alarm, self.block, self.losses, []
        early = math.inf
        if math.isnan(alarm.start):
            alarm.start = sorted(losses[: block // 8])[(block // 8 - 1) // 2]
            early = _edge(losses[-(block // 4) :])
        if alarm.score > block // 8:
            return False
        alarm.reference, alarm.early = min(alarm.reference, _edge(losses)), early
        if self.pending:
            self.audits.reference = min(self.audits.reference, self.audit)
            self.age, self.in_a_row, self.pending = self.candidate_age, 0, False
            return True
        return False

    def _begin_again(self) -> None:
        self.alarm.score = self.audits.score = 0
        self.losses, self.pending, self.ramp = [], False, 0


def _edge(losses: Sequence[float]) -> float:
    """m + 2 (q - m)."""
    size, ordered = len(losses), sorted(losses)
    median, high = ordered[-(-size // 2) - 1], ordered[-(-19 * size // 20) - 1]
    return median + 2 * (high - median)
