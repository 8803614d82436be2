"""Learning-rate schedules: the one that the paper used, and one that its theorem 7 covers.

Both are optax schedules: functions of the number of optimizer steps taken, from 0.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float

from .validation import check_positive


def paper_decay(
    rate: float | Float[Array, ""], tau: float = 50_000.0, *, power: float = 1.5
) -> optax.Schedule:
    """lr(t) = rate / (t / tau + 1)^power, the schedule of all the paper's experiments.

    It carries no guarantee: with power > 1 its sum is finite, so that SGD may stop short of the
    minimum, whereas theorem 7 asks for a rate proportional to 1 / (i0 + i).

    Args:
        rate: the rate at step 0, which may be traced, as for runs at several rates under ``vmap``.
        tau: time scale of the decay, in optimizer steps.
        power: 1.5 in the paper.

    Raises:
        ValueError: if rate, tau or power is not positive and finite.

    Source: the paper's appendix E.

    >>> schedule = paper_decay(3.0, tau=50_000)
    >>> float(schedule(0)), round(float(schedule(150_000)), 4)
    (3.0, 0.375)
    """
    _check(rate=rate, tau=tau, power=power)
    return lambda t: rate / (jnp.asarray(t, float) / tau + 1) ** power


def harmonic_decay(rate: float | Float[Array, ""], offset: float) -> optax.Schedule:
    """lr(t) = rate / (1 + t / offset), proportional to 1 / (offset + t): what theorem 7 asks for.

    Its sum diverges and the sum of its squares does not (Robbins and Monro, 1951).

    Args:
        rate: the rate at step 0, which may be traced.
        offset: the step i0 at which it has halved.

    Raises:
        ValueError: if rate or offset is not positive and finite.

    >>> float(harmonic_decay(0.5, offset=100)(100))
    0.25
    """
    _check(rate=rate, offset=offset)
    return lambda t: rate / (1 + jnp.asarray(t, float) / offset)


def _check(**numbers: Any) -> None:
    """Refuse numbers out of range; of traced ones nothing is known yet."""
    check_positive(**{k: one for k, one in numbers.items() if not isinstance(one, Tracer)})
