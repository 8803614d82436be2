"""Whether losses have risen for longer than their noise explains, on three scales of time."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any

LENGTHS = 1, 8, 64
"""Losses whose mean is a value, on each scale."""
BLOCK = 8
"""Values of a scale, of which its level and its deviation are renewed at once."""
BLOCKS, RECENT = 16, 4
"""Those that are remembered, and the last of them, to which the level falls."""
LAGS = 1, 2, 4
"""Blocks that are compared; noise that is autocorrelated differs more over several."""
READY = 4
"""Blocks before a scale suspects."""
ALLOWED = 0.5
"""Deviations above the level that don't count; half of the smallest rise that is looked for."""
CLIP = 3.0
"""Deviations that a value counts at most."""
CALM = 5.0
"""Below this sum a scale goes on to learn its level."""
THRESHOLD = 20.0
LEAST = 24
"""Losses that a rise has to last."""
PROGRESS = 0.02
"""The part of the recent progress by which values may differ, where they have no noise."""
FORGIVEN = 640
"""Losses after which the threshold is halved again."""


def _clipped(z: float) -> float:
    return max(z, -CLIP) if z < CLIP else CLIP  # NaN, too


def _apart(means: Sequence[float], lag: int) -> float:
    """The deviation of differences of means, a number of them apart."""
    steps = [after - before for before, after in zip(means, means[lag:], strict=False)]
    trend = statistics.median(steps)
    return 1.4826 * statistics.median(abs(step - trend) for step in steps)


class Scale:
    """Sums how far values are above their level: S <- max(0, S + z - 1/2), z = (x - m) / s in
    [-3, 3], for means x of some losses (Page's CUSUM).

    m is the median of the last 16 blocks of 8 values, or of the last 4 if that is lower; s is 1.48
    times the median distance of values from those of their block, or that of successive means of
    blocks, times sqrt(8), if that is more, as it is of autocorrelated noise.

    Attributes:
        sum: S.
        onset: the number of the first loss since it was 0.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.sum, self.onset = 0.0, 0
        self.level, self.deviation = math.nan, math.nan
        self._usual = 0.0
        """The mean distance from the level, of noise that is skewed."""
        self._part: list[float] = []
        """Losses of the next value."""
        self._block: list[float] = []
        self._blocks: deque[list[float]] = deque(maxlen=BLOCKS)

    @property
    def is_ready(self) -> bool:
        return not math.isnan(self.level)

    def hear(self, loss: float, number: int) -> bool:
        """Whether there is a new value, of the loss of this number and those before it."""
        self._part.append(loss)
        if len(self._part) < self.length:
            return False
        value = sum(self._part) / self.length
        self._part = []
        if self.is_ready:
            z = _clipped((value - self.level) / self.deviation)
            self._add(z - self._usual, number)
        if self.sum < CALM and math.isfinite(value):
            self._block.append(value)
            if len(self._block) == BLOCK:
                self._blocks.append(self._block)
                self._block = []
                self._renew()
        return True

    def learn(self, losses: Sequence[float]) -> None:
        """The level is that of these losses; nothing is suspected."""
        self.sum = 0.0
        self._part, self._block = [], []
        found = [loss for loss in losses if math.isfinite(loss)]
        if found:
            self._blocks.clear()
        if found and self.is_ready:
            self.level = statistics.median(found)

    def numbers(self) -> dict[str, Any]:
        lists = {"_part": [*self._part], "_block": [*self._block], "_blocks": [*self._blocks]}
        return {**vars(self), **lists}

    def load(self, numbers: dict[str, Any]) -> None:
        blocks = deque(map(list, numbers["_blocks"]), maxlen=BLOCKS)
        lists = {"_part": [*numbers["_part"]], "_block": [*numbers["_block"]], "_blocks": blocks}
        vars(self).update({**{name: numbers[name] for name in vars(self)}, **lists})

    def _add(self, z: float, number: int) -> None:
        if self.sum <= 0:
            self.onset = number - self.length + 1
        self.sum = max(0.0, self.sum + z - ALLOWED)

    def _renew(self) -> None:
        if len(self._blocks) < READY:
            return
        blocks = list(self._blocks)
        values = list(chain.from_iterable(blocks))
        self.level = min(statistics.median(values), statistics.median(values[-RECENT * BLOCK :]))
        middles = [statistics.median(block) for block in blocks]
        near = [x - m for block, m in zip(blocks, middles, strict=True) for x in block]
        means = [sum(block) / BLOCK for block in blocks]
        apart = max(_apart(means, lag) for lag in LAGS if 2 * lag <= len(means))
        progress = max(means) - min(means)
        self.deviation = max(
            1.4826 * statistics.median(map(abs, near)),
            apart * math.sqrt(BLOCK / 2),
            PROGRESS * progress,
            1e-6 * abs(self.level),
            1e-30,
        )
        self._usual = max(0.0, statistics.fmean(_clipped(one / self.deviation) for one in near))


class Detector:
    """Suspects where a sum is above the threshold.

    A suspicion that came to nothing doubles the threshold; each 640 losses halve it again.

    Attributes:
        score: the highest sum of the scales.
        threshold: what it is compared with.
        onset: the number, from 1, of the first loss since that sum was 0.
        heard: losses so far.

    >>> detector = Detector()
    >>> noise = [0.1 * (k * k % 7) for k in range(200)]
    >>> any([detector.hear(1 + one) for one in noise])
    False
    >>> [detector.hear(2 + one) for one in noise].index(True), detector.onset
    (21, 199)
    """

    def __init__(self) -> None:
        self.threshold = THRESHOLD
        self.heard = 0
        self._since = 0
        """Losses since the threshold was changed."""
        self._last: deque[float] = deque(maxlen=LEAST)
        self._scales = [Scale(length) for length in LENGTHS]

    @property
    def score(self) -> float:
        return self._highest.sum

    @property
    def onset(self) -> int:
        return self._highest.onset

    @property
    def risen(self) -> int:
        """Losses from that one on."""
        return self.heard - self.onset + 1

    @property
    def deviation(self) -> float:
        """Of a loss, or of its means times the root of their number if that is more."""
        return self._scales[0].deviation

    def hear(self, loss: float) -> bool:
        """Whether it suspects that losses have risen; one that is NaN counts as high."""
        self.heard += 1
        self._last.append(loss)
        self._since += 1
        if self._since >= FORGIVEN and self.threshold > THRESHOLD:
            self.threshold /= 2
            self._since = 0
        for scale in self._scales:
            scale.hear(loss, self.heard)
        highest = self._highest
        if highest.sum <= self.threshold or self.heard - highest.onset < LEAST - 1:
            return False
        if self._has_ended():
            highest.sum = 0.0
            return False
        return not self._is_ending()

    def learn(self, losses: Sequence[float], *, confirmed: bool) -> None:
        """After a trial: what losses are now. The sums begin anew; if nothing was ``confirmed`` the
        threshold is doubled."""
        for scale in self._scales:
            scale.learn(losses)
        if not confirmed:
            self.threshold *= 2
            self._since = 0

    def numbers(self) -> dict[str, Any]:
        rest = {"_last": list(self._last), "_scales": [one.numbers() for one in self._scales]}
        return {**vars(self), **rest}

    def load(self, numbers: dict[str, Any]) -> None:
        """Know what ``numbers`` returned; all of it, or an error."""
        scales = [Scale(length) for length in LENGTHS]
        for scale, its_numbers in zip(scales, numbers["_scales"], strict=True):
            scale.load(its_numbers)
        last = deque(numbers["_last"], maxlen=LEAST)
        found = {name: numbers[name] for name in vars(self)}
        vars(self).update({**found, "_last": last, "_scales": scales})

    @property
    def _highest(self) -> Scale:
        return max(self._scales, key=lambda one: one.sum)

    def _has_ended(self) -> bool:
        """Whether the last 8 losses are where they were, by a quarter of a deviation."""
        now = list(self._last)[-8:]
        return statistics.fmean(now) < self._highest.level + self.deviation / 4

    def _is_ending(self) -> bool:
        """Whether the last 8 losses are lower than the 16 before, by two standard errors."""
        before, now = list(self._last)[:-8], list(self._last)[-8:]
        if not all(map(math.isfinite, before + now)):
            return False
        error = statistics.stdev(before) * math.sqrt(1 / len(before) + 1 / len(now))
        return statistics.fmean(before) - statistics.fmean(now) > 2 * error
