"""Tracking sequences: how the residual guard's bound mu follows the residuals it accepted.

Source: Heaton et al., "Safeguarded learned convex optimization", 2020, table 1.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, PyTree

from ..validation import check_fraction


class TrackingSequence(NamedTuple):
    """The rule for mu, which ``update`` follows on acceptance only."""

    init: Callable[[Array], PyTree]
    """The memory from mu_1."""
    update: Callable[[PyTree, Array], PyTree]
    """The memory after one more accepted residual r."""
    bound: Callable[[PyTree], Array]
    """mu."""


def ema(theta: float) -> TrackingSequence:
    """EMA(theta): mu <- theta r + (1 - theta) mu; theta weights the new residual.

    The paper's setting is theta = 0.9; read as a decay it is ``ema(0.1)``. ``ema(1.0)`` is the
    residual accepted last.

    Raises:
        ValueError: if theta is not above 0 and at most 1.

    >>> import jax.numpy as jnp
    >>> float(ema(0.75).update(jnp.array(1.0), jnp.array(3.0)))
    2.5
    """
    theta = check_fraction("theta", theta)
    return TrackingSequence(
        lambda mu: mu, lambda mu, r: theta * r + (1 - theta) * mu, lambda mu: mu
    )
