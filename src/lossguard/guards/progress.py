"""How fast a run's loss falls: its smoothed loss, and the power of its age that it falls by."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..rules import BETWEEN, LONG_MEMORY, MEMORY
from .protocol import advance
from .soundness import select


class Progress(NamedTuple):
    """A run's loss against its age, in optimizer steps since the run began."""

    age: Int[Array, ""]
    recent: Float[Array, ""]
    """The smoothed loss; NaN before the first."""
    lasting: Float[Array, ""]
    """The loss smoothed for longer."""
    earlier_age: Int[Array, ""]
    """A mark, at half of the age at most; 0 until there is one."""
    earlier: Float[Array, ""]
    """The smoothed loss there."""
    later_age: Int[Array, ""]
    """The next mark: there the age had doubled, and ``BETWEEN`` cycles had passed."""
    later: Float[Array, ""]


def begin(loss: Float[Array, ""] | float = jnp.nan, age: Int[Array, ""] | int = 0) -> Progress:
    """A run that begins at a loss, if one is known, as if at an age."""
    loss, age = jnp.asarray(loss, float), jnp.asarray(age, jnp.int32)
    return Progress(age, loss, loss, jnp.int32(0), loss, age, loss)


def add(progress: Progress, loss: Float[Array, ""], nt: int, memory: float = MEMORY) -> Progress:
    """After a cycle of nt steps of that mean loss; ``memory`` weighs the past in ``recent``.

    Where the loss is NaN nothing was seen, and the run is as it was.
    """
    first = progress.age == 0
    recent, lasting = (
        jnp.where(first, loss, weight * before + (1 - weight) * loss)
        for weight, before in ((memory, progress.recent), (LONG_MEMORY, progress.lasting))
    )
    age = advance(progress.age, nt)
    mark = (age // 2 >= progress.later_age) & (age >= progress.later_age + BETWEEN * nt)
    after = Progress(
        age,
        recent,
        lasting,
        jnp.where(mark, progress.later_age, progress.earlier_age),
        jnp.where(mark, progress.later, progress.earlier),
        jnp.where(mark, age, progress.later_age),
        jnp.where(mark, recent, progress.later),
    )
    return select(jnp.isnan(loss), progress, after)


def rate(progress: Progress) -> Float[Array, ""]:
    """a in loss ~ age^-a since the earlier mark; 1 until there is one.

    Where losses are not positive: 1 if the loss has fallen, 0 if it has not.
    """
    known, fell = progress.earlier_age > 0, progress.recent < progress.earlier
    positive = (progress.recent > 0) & (progress.earlier > 0)
    drop = jnp.log(jnp.where(positive, progress.earlier / progress.recent, 1))
    age, since = (n.astype(float) for n in (progress.age, jnp.maximum(progress.earlier_age, 1)))
    times = jnp.where(known, age / since, 2)
    a = jnp.where(positive, drop / jnp.log(times), fell.astype(float))
    return jnp.where(known, a, 1)


def expected_at(progress: Progress, age: Float[Array, ""]) -> Float[Array, ""]:
    """The loss at an age if it goes on falling by its power of the age.

    Where losses are not positive: the smoothed loss as it is.
    """
    own = jnp.maximum(progress.age, 1).astype(float)
    later = progress.recent * (own / age) ** rate(progress)
    return jnp.where((progress.recent > 0) & (age > 0), later, progress.recent)
