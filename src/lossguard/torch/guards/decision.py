"""What a cycle has shown of the lanes, and what a guard decided at its end."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

LEARNED, FALLBACK, OWN, NEITHER = 0, 1, 2, -1
"""``Decision.winner``: the learned optimizer's lane, the fallback's from x, the fallback's own; or
x stayed, or went back."""


class Seen(NamedTuple):
    """What a cycle has shown of a lane that ran, agreed between ranks."""

    losses: list[float]
    """Of training, each before its step."""
    checks: list[float]
    finite: bool
    """Whether parameters and buffers are."""

    @property
    def fine(self) -> bool:
        """Whether the losses of training are finite as well."""
        return self.finite and all(map(math.isfinite, self.losses))

    def is_fine(self, void: Sequence[bool]) -> bool:
        """Whether they are, of training, where another lane's are: not on ``void`` minibatches."""
        pairs = zip(void, self.losses, strict=True)
        return self.finite and all(skip or math.isfinite(loss) for skip, loss in pairs)


def passed_over(seen: Mapping[str, Seen]) -> tuple[list[bool], dict[str, Seen]]:
    """Minibatches on which no lane has a finite loss, and losses that have a lane's mean there.

    Such a minibatch is itself to blame, and tells nothing. A lane without a finite loss has NaN.
    """
    shown = [one.losses for one in seen.values()]
    void = [not any(map(math.isfinite, losses)) for losses in zip(*shown, strict=True)]

    def filled(losses: list[float]) -> list[float]:
        finite = [loss for loss in losses if math.isfinite(loss)]
        told = mean(finite) if finite else math.nan
        return [told if skip else loss for skip, loss in zip(void, losses, strict=True)]

    return void, {name: one._replace(losses=filled(one.losses)) for name, one in seen.items()}


class Decision(NamedTuple):
    """A plain record of one cycle; a list of them is a table for pandas or polars.

    Attributes:
        used_learned: nt flags: whether each step of the lane that ``losses`` are of was learned.
        losses: nt training losses, each before its step. Of which lane, the guard says.
        winner: the lane that the model has after the cycle: 0 learned, 1 fallback, 2 the fallback
            by itself, -1 where x stayed or went back (never with ``Recommended`` and ``Hedged``);
            with ``BestOf`` the optimizer's number.
        gradients: gradients evaluated, in all lanes.
        learned_updates: steps of learned optimizers, kept or not.
        forwards: losses evaluated without a gradient, in all lanes.
        learned_loss: the mean loss by which the learned lane was compared; NaN if none was.
        fallback_loss: the same of the fallback's, on the same minibatches.
        jumped: whether the model's parameters were replaced by another lane's, or an earlier
            point: a moving average of weights should begin again there.
    """

    used_learned: list[bool]
    losses: list[float]
    winner: int
    gradients: int
    learned_updates: int
    forwards: int = 0
    learned_loss: float = math.nan
    fallback_loss: float = math.nan
    jumped: bool = False

    def without(self, void: Sequence[bool]) -> Self:
        """The same with the losses of these minibatches NaN."""
        losses = zip(void, self.losses, strict=True)
        return self._replace(losses=[math.nan if skip else loss for skip, loss in losses])

    def price(self, u: float = 0.0) -> float:
        """Gradients + forward passes / 3 + learned updates times u: what was spent, in gradients.

        Args:
            u: the measured cost of one learned update in gradients of the task; 0: not counted.
        """
        return self.gradients + self.forwards / 3 + u * self.learned_updates


def mean(losses: Sequence[float]) -> float:
    """Their mean, which may be infinite or NaN; ``statistics.fmean`` raises errors there.

    >>> mean([1.0, math.inf]), mean([math.inf, -math.inf])
    (inf, nan)
    """
    return sum(losses) / len(losses)
