"""When a run has become worse than it was: the rule of ``lossguard.rewind``, on the host.

A block is B losses. Letters: m and q the median and the 0.95 quantile of a block; a the level at
the start, the median of the first B // 8 losses; r the reference, the lowest m + 3 (q - m) of all
blocks that ended in calm. A loss counts if it is above r + rise * max(0, a - r). The score goes up
by 1 with every loss that counts, and down by 1, never below 0, with every other one.
"""

import math


class Alarm:
    """Rings at a score of B // 2.

    >>> alarm = Alarm(block=16, rise=0.05)
    >>> for loss in [1.0] * 16: alarm.keep(loss)
    >>> alarm.end_block()
    >>> for loss in [9.0] * 8: alarm.hear(loss, sound=True)
    >>> alarm.rings
    True
    """

    def __init__(self, block: int, rise: float) -> None:
        self.block, self.rise = block, rise
        self.losses: list[float] = []
        self.start = math.nan
        self.reference = math.inf
        self.score = 0

    @property
    def rings(self) -> bool:
        """Whether there is an alarm."""
        return self.score >= self.block // 2

    @property
    def is_calm(self) -> bool:
        """Whether so few losses count that the block may serve as a reference."""
        return self.score <= self.block // 8

    @property
    def ends(self) -> bool:
        """Whether the block is full."""
        return len(self.losses) >= self.block

    def hear(self, loss: float, sound: bool) -> None:
        """Count one loss. It counts if it is high, or ``sound`` is false."""
        progress = self.start - self.reference
        margin = self.rise * progress if progress > 0 else 0.0
        counts = not sound or not loss <= self.reference + margin
        self.score = max(0, self.score + (1 if counts else -1))

    def keep(self, loss: float) -> None:
        """Write the loss of a step down in the present block."""
        self.losses.append(loss)

    def end_block(self) -> None:
        """Begin a block. The one that ends becomes the reference if it was calm and is lower."""
        size = self.block
        ordered = sorted(self.losses)
        median, high = ordered[-(-size // 2) - 1], ordered[-(-19 * size // 20) - 1]
        if math.isnan(self.start):
            self.start = sorted(self.losses[: size // 8])[(size // 8 - 1) // 2]
        if self.is_calm:
            self.reference = min(self.reference, median + 3 * (high - median))
        self.losses = []

    def quiet(self, forget: bool) -> None:
        """After an alarm: begin a block at score 0; ``forget`` the reference, or keep it."""
        self.losses, self.score = [], 0
        if forget:
            self.reference = math.inf


class Audit:
    """The same question, asked of one held minibatch: its loss has no noise, so few audits decide.

    An audit counts if it is above best + rise * max(0, first - best), of the first audit and the
    best one of a trusted snapshot. The audit rings at a score of 4.
    """

    def __init__(self, rise: float) -> None:
        self.rise = rise
        self.first = math.nan
        self.best = math.inf
        self.latest = math.nan
        self.score = 0

    @property
    def rings(self) -> bool:
        """Whether there is an alarm."""
        return self.score >= 4

    def hear(self, loss: float) -> bool:
        """Count one audit; whether it is no worse than the best."""
        self.latest = loss
        if math.isnan(self.first):
            self.first = loss
        progress = self.first - self.best
        good = loss <= self.best + (self.rise * progress if progress > 0 else 0.0)
        self.score = max(0, self.score + (-1 if good else 1))
        return good

    def trust(self) -> None:
        """The snapshot of the latest audit is trusted."""
        self.best = min(self.best, self.latest)

    def quiet(self, forget: bool) -> None:
        """After an alarm: begin at score 0; ``forget`` the best, or keep it."""
        self.score = 0
        if forget:
            self.best = math.inf
