"""What goes wrong in a run. Every row meets the same faults at the same part of its run.

Letters: G gradients a run may evaluate; k the number of a minibatch.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch

from .tasks import Batch

START, END = 0.4, 0.6
"""Parts of G at which faults begin, and at which bad labels end."""
SHORT = 20
"""Minibatches that a burst and a jump last."""
JUMP = 50.0
"""What the rate is multiplied by in a jump."""
NAN, WRONG = 0.01, 0.5
"""Parts of the minibatches whose gradients aren't finite, and of the labels that are drawn."""


class Fault(NamedTuple):
    """A rate that is ``rate`` times the good one all along, or something bad on the way."""

    name: str
    rate: float = 1.0
    bad: Literal["", "burst", "labels", "jump", "nan"] = ""


CLEAN = Fault("clean")
FAULTS = (
    *(Fault(f"rate x{m}", m) for m in (3, 10, 30, 100)),
    Fault("burst", bad="burst"),
    Fault("labels", bad="labels"),
    Fault("jump", bad="jump"),
    Fault("nan", bad="nan"),
)


class Happening:
    """A fault in the course of one run.

    Attributes:
        factor: what the rate is multiplied by in the present step.
        nan: whether the gradients of the present minibatch aren't finite.
    """

    def __init__(self, fault: Fault, classes: int) -> None:
        self.factor, self.nan = 1.0, False
        self._bad, self._classes = fault.bad, classes
        self._begun: int | None = None

    def strike(self, batch: Batch, k: int, part: float, random: np.random.Generator) -> Batch:
        """Minibatch k as the method sees it, after a ``part`` of G was spent."""
        if self._begun is None and part >= START:
            self._begun = k
        short = self._begun is not None and k < self._begun + SHORT
        self.factor = JUMP if self._bad == "jump" and short else 1.0
        self.nan = self._bad == "nan" and random.random() < NAN
        x, t = batch
        drawn = torch.from_numpy(random.integers(self._classes, size=t.shape))
        if self._bad == "burst" and short:
            if x.is_floating_point():
                return torch.from_numpy(10 * random.normal(size=x.shape)).float(), drawn
            return torch.from_numpy(random.integers(self._classes, size=x.shape)), drawn
        if self._bad == "labels" and START <= part < END:
            wrong = torch.from_numpy(random.random(size=t.shape) < WRONG)
            return x, torch.where(wrong, drawn, t)
        return batch
