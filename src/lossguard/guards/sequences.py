"""Tracking sequences: how the residual guard's bound mu follows the residuals it accepted.

Source: Heaton et al., "Safeguarded learned convex optimization", 2020, table 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..validation import check_count, check_fraction


class TrackingSequence(NamedTuple):
    """The rule for mu, which ``update`` follows on acceptance only."""

    init: Callable[[Array], PyTree]
    """The memory from mu_1."""
    update: Callable[[PyTree, Array], PyTree]
    """The memory after one more accepted residual r."""
    bound: Callable[[PyTree], Array]
    """mu."""


def geometric(theta: float) -> TrackingSequence:
    """GS(theta): mu <- theta mu.

    Raises:
        ValueError: if theta is not above 0 and at most 1.

    >>> float(geometric(0.5).update(jnp.array(1.0), jnp.array(7.0)))
    0.5
    """
    theta = check_fraction("theta", theta)
    return TrackingSequence(lambda mu: mu, lambda mu, r: theta * mu, lambda mu: mu)


def recent_term() -> TrackingSequence:
    """RT: mu <- r, the residual accepted last.

    >>> float(recent_term().update(jnp.array(1.0), jnp.array(7.0)))
    7.0
    """
    return TrackingSequence(lambda mu: mu, lambda mu, r: r, lambda mu: mu)


def arithmetic_average() -> TrackingSequence:
    """AA: mu <- (r + m mu) / (m + 1), with m residuals so far, mu_1 among them.

    >>> average = arithmetic_average()
    >>> float(average.bound(average.update(average.init(jnp.array(1.0)), jnp.array(3.0))))
    2.0
    """

    def update(memory: tuple[Array, Array], r: Array) -> tuple[Array, Array]:
        mu, m = memory
        return (r + m * mu) / (m + 1), m + 1

    return TrackingSequence(lambda mu: (mu, jnp.ones_like(mu)), update, lambda memory: memory[0])


def ema(theta: float) -> TrackingSequence:
    """EMA(theta): mu <- theta r + (1 - theta) mu; theta weights the new residual.

    The paper's setting is theta = 0.9; read as a decay it is ``ema(0.1)``.

    Raises:
        ValueError: if theta is not above 0 and at most 1.

    >>> float(ema(0.75).update(jnp.array(1.0), jnp.array(3.0)))
    2.5
    """
    theta = check_fraction("theta", theta)
    return TrackingSequence(
        lambda mu: mu, lambda mu, r: theta * r + (1 - theta) * mu, lambda mu: mu
    )


def recent_max(m: int = 30) -> TrackingSequence:
    """RM(m): mu <- the largest of the m residuals accepted last, mu_1 among them at first.

    m = 30 is the paper's setting.

    Raises:
        ValueError: if m is below 1.

    >>> largest = recent_max(2)
    >>> float(largest.bound(largest.update(jnp.array([5.0, 1.0]), jnp.array(3.0))))
    3.0
    """
    m = check_count("m", m)
    return TrackingSequence(
        lambda mu: jnp.full(m, -jnp.inf, mu.dtype).at[-1].set(mu),
        lambda recent, r: jnp.append(recent[1:], r),
        lambda recent: recent.max(),
    )
