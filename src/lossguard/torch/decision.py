"""What a guard decided at the end of a cycle, and the rule by which it decides."""

import math
from collections.abc import Sequence
from typing import NamedTuple

LEARNED, FALLBACK, OWN_PATH, NOBODY = 0, 1, 2, -1


class Decision(NamedTuple):
    """A plain record of one cycle; a list of them is a table for pandas or polars.

    Attributes:
        used_learned: nt flags, one per optimizer step: whether the learned update was kept.
        losses: nt training losses of the kept branch, each before its step; of the fallback's if x
            stayed.
        learned_loss: mean loss of y over the nc check minibatches (and over the ranks).
        fallback_loss: the same of z, or of the better of z and s.
        finite_learned: whether y and its check loss are finite.
        finite_fallback: the same of the fallback's.
        reset_learned: whether the learned optimizer's state was not finite and has been reset.
        reset_fallback: the same of the fallback's, or s began again at x.
        winner: 0 learned, 1 fallback, 2 the fallback on its own path, -1 none: x stayed.
        steps: optimizer steps by which the kept iterate moved on in this cycle, nt.
        gradients: gradients evaluated in this cycle, in all lanes.
        forwards: losses evaluated without a gradient in this cycle, in all lanes.
        learned_updates: steps that the learned optimizer took in this cycle.
    """

    used_learned: list[bool]
    losses: list[float]
    learned_loss: float
    fallback_loss: float
    finite_learned: bool
    finite_fallback: bool
    reset_learned: bool
    reset_fallback: bool
    winner: int
    steps: int
    gradients: int
    forwards: int
    learned_updates: int


def best(losses: Sequence[float], finite: Sequence[bool]) -> int:
    """The lane with the least check loss: x <- y if Fy < Fz else z.

    A lane that isn't finite can't win. Ties go to the later lane, so that the learned one, lane 0,
    has to be strictly better than every other. -1 if no lane is finite.

    >>> best([1.0, 2.0], [True, True]), best([2.0, 2.0], [True, True])
    (0, 1)
    >>> best([1.0, math.nan], [True, False]), best([math.nan, math.inf], [False, False])
    (0, -1)
    """
    winner, least = NOBODY, math.inf
    for lane in reversed(range(len(losses))):
        if finite[lane] and losses[lane] < least:
            winner, least = lane, losses[lane]
    return winner
