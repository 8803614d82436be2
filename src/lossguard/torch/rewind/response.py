"""How much a run may lose to returns, and how carefully it goes on after one."""

import math
from typing import Any

from lossguard.torch.rewind.trial import LONGEST, LOOK
from lossguard.validation import check_part

WINDOW = 256
"""Steps that may be thrown away from the start on."""
CAREFUL = 64
"""Steps after a return at half the rate of those that follow."""
REST = 256
"""Quiet steps after which one of the returns in a row is forgiven."""
DEEPEST = 5
"""Returns that count: the rate is at least 1 / 2^5 of itself, and whole after 4 rests."""
TRIALS, PART = 64, 0.01
"""Steps that trials may take which came to nothing: these, and this part of all."""


class Response:
    """The budgets of a run of T steps, and the means that it takes.

    discarded + fruitless <= rho T + WINDOW, and fruitless <= TRIALS + T / 100, where a model that
    isn't finite doesn't count: there is nothing to go on with.

    Attributes:
        calls: T.
        returns: how often the run has gone back for good.
        discarded: steps thrown away by returns that stay.
        fruitless: steps of trials that came to nothing.
        broken: steps thrown away as the model wasn't finite.
        in_a_row: returns not forgiven when the last one was made, which counts, too.
        quiet: steps since then.
    """

    def __init__(self, rho: float) -> None:
        self.rho = check_part("rho", rho)
        self.calls = self.returns = self.discarded = self.fruitless = self.broken = 0
        self.in_a_row = self.quiet = 0

    @property
    def scale(self) -> float:
        """What rates are multiplied by, of steps that aren't on trial."""
        return 0.5 ** max(0, self._unforgiven - (self.quiet >= CAREFUL))

    @property
    def means(self) -> tuple[str, ...]:
        """What a return takes now beside the rate: more, if it is one of several in a row."""
        return ("memory", "clipping")[: self._unforgiven]

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped to their usual norm after the last return."""
        return self._unforgiven >= 3

    def pass_by(self, steps: int) -> None:
        """So many more were taken."""
        self.calls += steps
        self.quiet += steps

    def may_return(self, thrown: int) -> bool:
        """Whether a return is affordable that throws so many steps away."""
        return max(thrown, 0) <= self._left

    @property
    def longest_trial(self) -> int:
        """Steps that a trial may take that has to be taken back: a short one shows a large rise."""
        left = TRIALS + math.floor(PART * self.calls) - self.fruitless
        return min(LONGEST, left, self._left) // LOOK * LOOK

    def stayed(self, thrown: int) -> None:
        """A return stays."""
        self.discarded += thrown
        self._return()

    def broke(self, thrown: int) -> None:
        """The run went back, as the model wasn't finite."""
        self.broken += thrown
        self._return()

    def failed(self, steps: int) -> None:
        """A trial of so many steps came to nothing."""
        self.fruitless += steps

    @property
    def _left(self) -> int:
        budget = WINDOW + math.floor(self.rho * (1 - 1e-9) * self.calls)
        return budget - self.discarded - self.fruitless

    @property
    def _unforgiven(self) -> int:
        return max(0, min(self.in_a_row, DEEPEST) - self.quiet // REST)

    def _return(self) -> None:
        self.in_a_row = self._unforgiven + 1
        self.quiet = 0
        self.returns += 1

    def numbers(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "rho"}

    def load(self, numbers: dict[str, Any]) -> None:
        vars(self).update({name: numbers[name] for name in self.numbers()})
