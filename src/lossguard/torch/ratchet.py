"""When does x go back to its best? A rule over training losses, at longer intervals than a cycle.

A check can't see what each of many cycles spoils a little, late in a run, where a few hard examples
make up the loss. Over a hundred cycles' training losses it shows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lossguard.torch.inner import Memory
from lossguard.torch.weights import Copy, Weights
from lossguard.validation import check_count, check_tolerance


class Ratchet(NamedTuple):
    """How x is compared with its best.

    Attributes:
        cycles: between two comparisons.
        tolerance: by how much x's losses may be higher, relative to those of its best.
    """

    cycles: int
    tolerance: float

    def compare(self, kept: float, held: float, cycles: int) -> tuple[bool, bool]:
        """Whether x is the new best, and whether it goes back to the old one.

        Args:
            kept: X, the sum of x's training losses since they were last compared.
            held: B, that of its best on the same minibatches.
            cycles: since then.

        >>> ratchet().compare(kept=1.2, held=1.0, cycles=100)
        (False, True)
        """
        due, bound = cycles >= self.cycles, held + self.tolerance * abs(held)
        return due and kept <= held, due and not kept <= bound


class Best:
    """b, the best x so far, and how x has done against it.

    Attributes:
        copy: its parameters and buffers. Out of date while x is on the fallback's own path, where b
            is x.
        memory: what the optimizer of lane z remembered there; None without z.
        losses: its training losses in this cycle, one per minibatch.
        cycles, kept, held: since they were last compared, and X and B.
        anew: whether x went back, and the learned optimizers are to begin anew when they run next.
        begun: whether a cycle has begun. Until then x may be set from outside, and b is x.
    """

    def __init__(self, rule: Ratchet, copy: Copy, memory: Memory | None) -> None:
        self.rule = rule
        self.copy = copy
        self.memory = memory
        self.losses: list[Tensor] = []
        self.cycles, self.kept, self.held = 0, 0.0, 0.0
        self.anew = False
        self.begun = False

    def begin(self, x: Weights) -> None:
        """Start a cycle."""
        self.losses = []
        if not self.begun:
            x.copy_to(self.copy)
        self.begun = True

    def update(
        self, kept: Sequence[float], held: Sequence[float], was_own: bool, is_own: bool
    ) -> tuple[bool, bool]:
        """After a cycle: whether b is to be x, and whether x goes back to b.

        Args:
            kept: training losses of the branch that was kept; none where x stayed.
            held: those of b; none where x was on the fallback's own path.
            was_own: whether it was there before the cycle.
            is_own: whether it is now.
        """
        self.cycles += 1
        if kept and not was_own:
            known = [pair for pair in zip(kept, held, strict=True) if math.isfinite(pair[1])]
            self.kept += sum(x for x, _ in known)
            self.held += sum(b for _, b in known)
        better, back = self.rule.compare(self.kept, self.held, self.cycles)
        own = was_own or is_own
        if own or self.cycles >= self.rule.cycles:
            self.cycles, self.kept, self.held = 0, 0.0, 0.0
        return not is_own and (was_own or better), back and not own


def ratchet(*, cycles: int = 100, tolerance: float = 0.1) -> Ratchet:
    """Go back to the best x where the losses since are higher than its own would have been.

    Every ``cycles`` cycles, with b the best x so far:

        X <- sum F(x's branch, i+t);  B <- sum F(b, i+t)    over all steps with a finite F(b, i+t)
        b <- x   if X <= B;     x <- b   if X > B + tolerance |B|

    b's losses are on the same minibatches, before each step, so that the two are compared without
    the noise that they share. b is x where this is on the fallback's own path. Wherever it isn't
    the closure is called once more per train minibatch, for the loss alone (``guard.checking`` is
    true).

    Args:
        cycles: between two comparisons.
        tolerance: by how much x's losses may be higher, relative to those of its best.

    Raises:
        ValueError: if cycles is not an integer of at least 1, or tolerance is not at least 0 and
            finite.

    >>> from lossguard.torch import LossGuard
    >>> import torch
    >>> w = torch.ones(1, requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=3.0), torch.optim.SGD([w], lr=0.1)
    >>> guard = LossGuard(learned, fallback, ratchet=ratchet(cycles=100))
    """
    return Ratchet(check_count("cycles", cycles), check_tolerance(tolerance))
