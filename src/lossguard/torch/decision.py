"""What a guard decided at the end of a cycle."""

from typing import NamedTuple

NEITHER = -1


class Decision(NamedTuple):
    """A plain record of one cycle; a list of them is a table for pandas or polars.

    Attributes:
        used_learned: nt flags, one per optimizer step: whether the model has got the learned
            update.
        losses: nt training losses of the branch given out, each before its step; of the fallback's
            if x stayed.
        learned_loss: mean loss of y over the check minibatches, and the training ones that the
            criterion counts (and over the ranks), of the best y if there are several; NaN if no
            learned lane ran.
        fallback_loss: the same of z, or of the better of z and s; NaN if nothing was checked.
        finite_learned: whether y and the losses compared are finite, of any y if there are several.
        finite_fallback: the same of the fallback's.
        reset_learned: whether a learned optimizer's state was not finite and has been reset.
        reset_fallback: the same of the fallback's, or s began again at x.
        winner: the lane that the model has got: the learned ones from 0 in their order, then z,
            then s; -1 none: x stayed, or went back to its best.
        steps: optimizer steps by which the kept iterate moved on in this cycle, nt.
        gradients: gradients evaluated in this cycle, in all lanes.
        forwards: losses evaluated without a gradient in this cycle, in all lanes.
        learned_updates: steps that the learned optimizers took in this cycle.
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
