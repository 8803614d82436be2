"""Tracking sequences: how the residual guard's bound mu follows the residuals it accepted.

Source: Heaton et al., "Safeguarded learned convex optimization", 2020, table 1.
"""

from collections.abc import Callable
from typing import NamedTuple

from lossguard.torch.arguments import check_count, check_fraction

Track = list[float]


class Sequence(NamedTuple):
    """The rule for mu; its memory is a list of numbers, so that a ``state_dict`` holds it.

    Attributes:
        init: the memory from mu_1.
        update: the memory after one more accepted residual r.
        bound: mu.
    """

    init: Callable[[float], Track]
    update: Callable[[Track, float], Track]
    bound: Callable[[Track], float]


def geometric(theta: float) -> Sequence:
    """GS(theta): mu <- theta mu.

    >>> geometric(0.5).update([1.0], 7.0)
    [0.5]
    """
    check_fraction("theta", theta)
    return Sequence(lambda mu: [mu], lambda mu, r: [theta * mu[0]], _first)


def recent_term() -> Sequence:
    """RT: mu <- r."""
    return Sequence(lambda mu: [mu], lambda mu, r: [r], _first)


def arithmetic_average() -> Sequence:
    """AA: mu <- (r + m mu) / (m + 1), with m residuals so far, mu_1 among them."""

    def update(memory: Track, r: float) -> Track:
        mu, m = memory
        return [(r + m * mu) / (m + 1), m + 1]

    return Sequence(lambda mu: [mu, 1.0], update, _first)


def ema(theta: float) -> Sequence:
    """EMA(theta): mu <- theta r + (1 - theta) mu; theta weights the new residual.

    The paper's setting is theta = 0.9; read as a decay it is ``ema(0.1)``.

    >>> ema(0.75).update([1.0], 3.0)
    [2.5]
    """
    check_fraction("theta", theta)
    return Sequence(lambda mu: [mu], lambda mu, r: [theta * r + (1 - theta) * mu[0]], _first)


def recent_max(m: int = 30) -> Sequence:
    """RM(m): mu <- the largest of the last m accepted residuals, mu_1 among them at first."""
    check_count("m", m)
    return Sequence(lambda mu: [mu], lambda recent, r: [*recent, r][-m:], max)


def _first(memory: Track) -> float:
    return memory[0]
