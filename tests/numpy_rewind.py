"""The rule of ``rewind`` in plain Python, with every iterate and every loss kept in lists.

``Rule`` decides from the losses alone. JAX and PyTorch are held to it, on losses and gradients that
are sums of powers of two.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

KINDS = ("flat", "falls", "rises", "spikes", "infinite", "broken", "lower", "void")
LENGTH = 600
OPTIONS = (
    {"window": 64, "rise": 1 / 16},
    {"window": 128, "rho": 0.5, "factor": 0.25, "rise": 0.125},
    {"window": 64, "rho": 0.0, "rise": 0.0},
)


class Rule:
    """What ``rewind`` does with each loss: ``tell`` says "take", "skip" or "return".

    Attributes:
        path: for each step taken and not thrown away, the loss before it.
        trusted, candidate: lengths of ``path`` at the snapshots; None where there is no candidate.
    """

    def __init__(
        self, window: int = 256, rho: float = 0.1, factor: float = 0.5, rise: float = 0.05
    ) -> None:
        self.window, self.rho, self.factor, self.rise = window, rho, factor, rise
        self.block = window // 4
        self.path: list[float] = []
        self.trusted, self.candidate = 0, None
        self.reference, self.early, self.start = math.inf, math.inf, None
        self.score, self.in_block, self.ramp = 0, 0, self.block
        self.in_a_row, self.cap, self.last_return = 0, 1.0, None
        self.calls = self.thrown = self.returns = self.unanswered = self.skipped = self.idle = 0

    @property
    def scale(self) -> float:
        """What the next step is multiplied by."""
        done = min(1.0, self.ramp / self.block)
        return self.cap * (self.factor + (1 - self.factor) * done)

    @property
    def threshold(self) -> float:
        """Losses above it speak against the run."""
        lowest = min(self.reference, self.early)
        if self.start is None or not math.isfinite(self.start):
            return lowest
        return lowest + self.rise * max(0.0, self.start - lowest)

    def tell(self, loss: float, sound: bool = True, late: int = 0, given: bool = True) -> str:
        """One loss, and whether it and the step from where it was measured are finite.

        ``given`` says whether the loss and its gradient are. PyTorch is ``late`` by 1: a step is
        taken before its loss is told, and thrown away as well.
        """
        self.calls += 1
        bad = not sound or loss > self.threshold
        self.score = max(0, self.score + (1 if bad else -1))
        age = len(self.path) - self.trusted + late
        if self.score >= self.block // 2 and age == late and not given:
            self.score, self.idle = 0, self.idle + 1  # there is nothing to mend
        if self.score >= self.block // 2:
            self.score, self.in_block, self.ramp, self.candidate = 0, 0, 0, None
            allowed = self.window + math.floor(self.rho * (1 - 1e-6) * self.calls)
            if self.in_a_row < 3 and self.thrown + age <= allowed:
                self._go_back(age)
                return "return"
            self.unanswered += 1
            self.in_a_row, self.reference, self.early = 0, math.inf, math.inf
        if not sound:
            self.skipped += 1
            return "skip"
        self.path.append(loss)
        self.in_block += 1
        self.ramp += 1
        if self.in_block == self.block:
            self._end_block()
        return "take"

    def _go_back(self, age: int) -> None:
        self.thrown += age
        self.returns += 1
        self.in_a_row += 1
        if self.last_return is not None and self.calls - self.last_return <= 10 * self.window:
            self.cap = max(self.cap * self.factor, self.factor**5)
        self.last_return = self.calls
        del self.path[self.trusted :]

    def _end_block(self) -> None:
        losses, early = self.path[-self.block :], math.inf
        if self.start is None:
            self.start = sorted(losses[: self.block // 8])[(self.block // 8 - 1) // 2]
            early = self._bound(losses[3 * self.block // 4 :])
        if self.score <= self.block // 8:
            self.reference, self.early = min(self.reference, self._bound(losses)), early
            if self.candidate is not None:
                self.trusted, self.in_a_row = self.candidate, 0
        self.candidate = len(self.path)
        self.in_block = 0

    @staticmethod
    def _bound(losses: list[float]) -> float:
        median, high = (sorted(losses)[math.ceil(q * len(losses)) - 1] for q in (0.5, 0.95))
        return median + 2 * (high - median)


class Run:
    """A run under the rule: ``step(point)`` is called with what ``at`` gives, a loss and a step.

    Args:
        start: the first point, anything that ``advance`` knows.
        advance: ``advance(point, i, scale)``: loss on minibatch i, the point after the step,
            whether both are finite, and whether the loss and its gradient are.
        late: whether a step is taken before its loss is told.
    """

    def __init__(
        self,
        start: Any,
        advance: Callable[..., tuple[float, Any, bool, bool]],
        late: bool = False,
        **options: Any,
    ):
        self.rule, self.points, self.advance, self.late = Rule(**options), [start], advance, late

    def step(self, i: int) -> str:
        """One minibatch."""
        loss, point, sound, given = self.advance(self.points[-1], i, self.rule.scale)
        told = self.rule.tell(loss, sound, int(self.late and sound), given)
        if told == "take":
            self.points.append(point)
        del self.points[len(self.rule.path) + 1 :]
        return told


def losses_of(kinds: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradients that behave in each part of a run as it says."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 64, LENGTH) / 64
    gradients = rng.integers(-8, 9, (LENGTH, 2)) / 8.0
    level, levels = 16.0, np.empty(LENGTH)
    for rows, kind in zip(np.array_split(np.arange(LENGTH), len(kinds)), kinds, strict=True):
        count = np.arange(len(rows))
        slope = {"falls": -1 / 32, "rises": 1 / 16}.get(kind, 0.0)
        level += {"lower": -2.0, "spikes": 8.0}.get(kind, 0.0)
        levels[rows] = level + slope * count
        level = levels[rows[-1]] - (8.0 if kind == "spikes" else 0.0)
        if kind == "infinite":
            levels[rows[count % 3 > 0]] = np.inf
        if kind in ("broken", "void"):
            gradients[rows[count % 4 > 0] if kind == "broken" else rows] = np.nan
        if kind == "void":
            levels[rows] = np.inf
    return levels + noise, gradients
