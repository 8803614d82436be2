"""How long a cycle is: nt and nc times a factor that may change from cycle to cycle."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..validation import check_count, check_real
from .criteria import moments


class Windows(NamedTuple):
    """``update(factor, learned, fallback, n)``: the factor of the next cycle, from 1 to ``most``.

    ``learned`` and ``fallback`` are check losses, of which the first n count.
    """

    update: Callable[[Int[Array, ""], Array, Array, Int[Array, ""]], Int[Array, ""]]
    most: int


def fixed() -> Windows:
    """nt and nc as they are: the paper's.

    >>> fixed().most
    1
    """
    return Windows(lambda factor, learned, fallback, n: factor, 1)


def adaptive(*, most: int = 16, apart: float = 2.0) -> Windows:
    """nt and nc grow together where the check losses can't tell the branches apart.

    With means and standard deviations of the two branches' check losses:

        |mean_y - mean_z| < sd_y + sd_z             twice as long, up to ``most`` times nt and nc
        |mean_y - mean_z| > apart (sd_y + sd_z)     half as long, down to nt and nc

    It takes nc of at least 2, since one loss has no deviation. Where the criterion is sequential,
    nc is its own matter, and nt alone grows.

    Args:
        most: the largest factor of nt and nc.
        apart: the gap from which cycles get shorter, in sums of the two deviations.

    Raises:
        ValueError: if most is not an integer of at least 1, or apart not at least 1.

    Source: the paper's proposal, section 4.2, which leaves the rates and "far apart" open.

    >>> near, far = jnp.array([1.0, 2.0]), jnp.array([9.0, 9.5])
    >>> factor, update = jnp.int32(4), adaptive().update
    >>> int(update(factor, near, near + 0.1, jnp.int32(2)))
    8
    >>> int(update(factor, near, far, jnp.int32(2)))
    2
    """
    most = check_count("most", most)
    apart = check_real("apart", apart, "at least 1", lambda v: v >= 1)

    def update(factor: Array, learned: Array, fallback: Array, n: Array) -> Array:
        (mean_y, mean_z), (sd_y, sd_z) = moments(jnp.stack([learned, fallback]), n)
        gap, spread = jnp.abs(mean_y - mean_z), sd_y + sd_z
        longer = jnp.where(gap < spread, jnp.minimum(2 * factor, most), factor)
        return jnp.where(gap > apart * spread, jnp.maximum(factor // 2, 1), longer)

    return Windows(update, most)
