"""Tracking sequences: how the residual guard's bound mu follows the residuals it accepted.

Source: Heaton et al., "Safeguarded learned convex optimization", 2020, table 1.
"""

from collections.abc import Callable
from typing import NamedTuple

from lossguard.validation import check_count, check_fraction

Track = list[float]


class TrackingSequence(NamedTuple):
    """The rule for mu; its memory is a list of numbers, so that a ``state_dict`` holds it.

    Attributes:
        update: the memory after one more accepted residual r.
        bound: mu.
        init: the memory from mu_1.
    """

    update: Callable[[Track, float], Track]
    bound: Callable[[Track], float] = lambda memory: memory[0]
    init: Callable[[float], Track] = lambda mu: [mu]


def geometric(theta: float) -> TrackingSequence:
    """GS(theta): mu <- theta mu.

    Raises:
        ValueError: if theta is not above 0 and at most 1.

    >>> geometric(0.5).update([1.0], 7.0)
    [0.5]
    """
    theta = check_fraction("theta", theta)
    return TrackingSequence(lambda memory, r: [theta * memory[0]])


def recent_term() -> TrackingSequence:
    """RT: mu <- r.

    >>> recent_term().update([1.0], 7.0)
    [7.0]
    """
    return TrackingSequence(lambda memory, r: [r])


def arithmetic_average() -> TrackingSequence:
    """AA: mu <- (r + m mu) / (m + 1), with m residuals so far, mu_1 among them.

    >>> average = arithmetic_average()
    >>> average.bound(average.update(average.init(1.0), 3.0))
    2.0
    """

    def update(memory: Track, r: float) -> Track:
        mu, m = memory
        return [(r + m * mu) / (m + 1), m + 1]

    return TrackingSequence(update, init=lambda mu: [mu, 1.0])


def ema(theta: float) -> TrackingSequence:
    """EMA(theta): mu <- theta r + (1 - theta) mu; theta weights the new residual.

    The paper's setting is theta = 0.9; read as a decay it is ``ema(0.1)``.

    Raises:
        ValueError: if theta is not above 0 and at most 1.

    >>> ema(0.75).update([1.0], 3.0)
    [2.5]
    """
    theta = check_fraction("theta", theta)
    return TrackingSequence(lambda memory, r: [theta * r + (1 - theta) * memory[0]])


def recent_max(m: int = 30) -> TrackingSequence:
    """RM(m): mu <- the largest of the last m accepted residuals, mu_1 among them at first.

    Raises:
        ValueError: if m is below 1.

    >>> largest = recent_max(2)
    >>> largest.bound(largest.update([5.0, 1.0], 3.0))
    3.0
    """
    m = check_count("m", m)
    return TrackingSequence(lambda memory, r: [*memory, r][-m:], bound=max)
