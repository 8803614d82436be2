"""A trial: is a challenger better than the leader, from the same point, on the same minibatches?"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MARGIN = 2.5
"""Standard errors by which a challenger has to be better."""


class Trial(NamedTuple):
    """Losses of challenger and leader in a trial under way."""

    cycles: Int[Array, ""]
    """Since it began."""
    length: Int[Array, ""]
    """How many cycles it takes at most; 0: there is no trial."""
    pairs: Int[Array, ""]
    """Of the paired differences, challenger - leader, that are counted."""
    total: Float[Array, ""]
    """The sum of these differences."""
    squares: Float[Array, ""]
    """The sum of their squares."""


def begin(length: Int[Array, ""] | int, dtype: jnp.dtype) -> Trial:
    """A trial of so many cycles; 0: none."""
    zero, nothing = jnp.zeros((), dtype), jnp.int32(0)
    return Trial(nothing, jnp.asarray(length, jnp.int32), nothing, zero, zero)


def add(trial: Trial, challenger: Float[Array, " nt"], leader: Float[Array, " nt"]) -> Trial:
    """After a cycle. What counts are the differences in the second half of the trial."""
    nt = len(leader)
    counts = trial.cycles * nt + jnp.arange(nt) >= trial.length * nt // 2
    d = jnp.where(counts, (challenger - leader).astype(trial.total.dtype), 0)
    return Trial(
        trial.cycles + 1,
        trial.length,
        trial.pairs + counts.sum(dtype=jnp.int32),
        trial.total + d.sum(),
        trial.squares + (d**2).sum(),
    )


def outcome(trial: Trial) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the challenger has won, and whether it has lost; neither: the trial goes on.

    With m and e the mean of the differences and its standard error, it has won at the end if
    m < -2.5 e. Where a loss is not finite it has lost.
    """
    mean = mean_difference(trial)
    n = jnp.maximum(trial.pairs, 2).astype(trial.total.dtype)
    error = jnp.sqrt(jnp.maximum(trial.squares / n - mean**2, 0) / (n - 1))
    over = trial.cycles >= trial.length
    won = over & (mean < -MARGIN * error)
    return won, ~won & (over | ~jnp.isfinite(trial.total))


def mean_difference(trial: Trial) -> Float[Array, ""]:
    """m, below 0 where the challenger is better."""
    return trial.total / jnp.maximum(trial.pairs, 1).astype(trial.total.dtype)
