"""A trial: is a challenger better than the leader, from the same point, on the same minibatches?"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..rules import DIVERGED, LOOKS, MARGIN


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
    size: Float[Array, ""]
    """Their Euclidean norm: squares might overflow, or vanish."""
    bound: Float[Array, ""]
    """The leader's smoothed loss when it began, which the challenger has to be below; NaN until
    the first loss of a run is known."""


def bounded(losses: Float[Array, "..."]) -> Float[Array, "..."]:
    """Losses that can be added up: one that isn't finite is a huge one.

    So it cancels where both lanes have it, and a single one decides no trial: among n pairs its
    difference is as large as its standard error.
    """
    most = jnp.finfo(losses.dtype).max / 2**23
    return jnp.where(jnp.isfinite(losses), jnp.clip(losses, -most, most), most)


def breaks(losses: Float[Array, " nt"], others: Float[Array, " nt"]) -> Bool[Array, ""]:
    """Whether a lane has no finite loss in a cycle in which another one has."""
    return ~jnp.isfinite(losses).any() & jnp.isfinite(others).any()


def finite_mean(losses: Float[Array, " nt"]) -> Float[Array, ""]:
    """The mean of those that are finite; NaN if none is."""
    finite = jnp.isfinite(losses)
    return jnp.where(finite, losses, jnp.mean(losses, where=finite)).mean()


def begin(length: Int[Array, ""], bound: Float[Array, ""]) -> Trial:
    """A trial of so many cycles."""
    zero, nothing = jnp.zeros_like(bound), jnp.int32(0)
    return Trial(nothing, length, nothing, zero, zero, bound)


def unbounded() -> Trial:
    """A trial of ``LOOKS`` cycles, which the challenger wins by its losses alone."""
    return begin(jnp.int32(LOOKS), jnp.array(jnp.inf, float))


def none() -> Trial:
    """No trial."""
    return begin(jnp.int32(0), jnp.zeros(()))


def add(trial: Trial, challenger: Float[Array, " nt"], leader: Float[Array, " nt"]) -> Trial:
    """After a cycle. What counts are the differences in the second half of the trial.

    Until the middle those since its first half cycle count: they can end it early. At the start of
    a run the bound is 0.9 of the first loss (|loss| / 10 below it).
    """
    nt, challenger, leader = len(leader), bounded(challenger), bounded(leader)
    counts = jnp.arange(nt, dtype=jnp.int32) >= jnp.where(trial.cycles == 0, nt // 2, 0)
    d = jnp.where(counts, challenger - leader, 0)
    middle = trial.cycles == trial.length // 2
    pairs, total, size = (jnp.where(middle, 0, n) for n in (trial.pairs, trial.total, trial.size))
    most = jnp.maximum(size, jnp.abs(d).max())
    unit = jnp.where(jnp.isfinite(most) & (most > 0), most, 1)
    return Trial(
        trial.cycles + 1,
        trial.length,
        pairs + counts.sum(dtype=jnp.int32),
        total + d.sum(),
        unit * jnp.sqrt((size / unit) ** 2 + ((d / unit) ** 2).sum()),
        jnp.where(jnp.isnan(trial.bound), leader[0] - jnp.abs(leader[0]) / 10, trial.bound),
    )


def play(
    trial: Trial, challenger: Float[Array, " nt"], leader: Float[Array, " nt"]
) -> tuple[Trial, Bool[Array, ""], Bool[Array, ""]]:
    """The trial after a cycle, and whether the challenger has won, or has lost; else it goes on.

    With m and e the mean of the differences and its standard error: it has lost if m > 3 e at any
    time; it has won at the end if its last losses are below the bound, and m < -3 e; or if they
    are, and below the leader's one by one, which have risen to ten times that: differences that
    grow with each step of a leader that diverges have a large e.
    """
    trial = add(trial, challenger, leader)
    mean, error = difference(trial)
    half = len(leader) // 2
    last, against = bounded(challenger[half:]), bounded(leader[half:])
    risen = against.mean() > trial.bound + DIVERGED * jnp.abs(trial.bound)
    better = (mean < -MARGIN * error) | (risen & (last < against).all())
    over = trial.cycles >= trial.length
    won = over & better & (finite_mean(challenger[half:]) < trial.bound)
    return trial, won, ~won & (over | ~(mean <= MARGIN * error))


def difference(trial: Trial) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean of the differences that count, and its standard error."""
    n = jnp.maximum(trial.pairs, 2).astype(float)
    mean = trial.total / n
    part = mean / jnp.where(trial.size > 0, trial.size, 1)
    return mean, trial.size * jnp.sqrt(jnp.maximum(1 / n - part**2, 0) / (n - 1))
