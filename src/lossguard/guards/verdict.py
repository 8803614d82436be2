"""Line 16 of Algorithm 2, over lanes: which of those that were checked is kept."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .criteria import Criterion, moments

NEITHER = -1


class Verdict(NamedTuple):
    """Which of the lanes that were checked is kept; lanes are rows, the m learned ones first."""

    row: Int[Array, ""]
    """The row that is kept, or -1."""
    settled: Bool[Array, ""]
    """Whether the criterion has decided about every learned lane."""
    best_learned: Int[Array, ""]
    best_fallback: Int[Array, ""]
    learned_loss: Float[Array, ""]
    fallback_loss: Float[Array, ""]
    finite_learned: Bool[Array, ""]
    finite_fallback: Bool[Array, ""]


def judge(
    criterion: Criterion,
    checks: Float[Array, "lanes most"],
    n: Int[Array, ""],
    sound: Bool[Array, " lanes"],
    m: int,
) -> Verdict:
    """Compare the lanes on n check minibatches: line 16 of Algorithm 2.

    Row m is the fallback's: a learned lane is kept if ``criterion`` says that it is better. Row
    m + 1, if there is one, is the fallback on its own path: it is kept if its mean is no higher
    than that of what the others came to. Lanes that are not ``sound``, or whose losses are not
    finite, can't win.
    """
    means, _ = moments(checks, n)
    finite = sound & jnp.isfinite(means)
    ranked = jnp.where(finite, means, jnp.inf)

    def gains(rows: slice, over: Int[Array, ""] | int) -> Float[Array, "rows most"]:
        """By how much some rows are lower than another one; -1 or 1 where one is not finite."""
        d = jnp.where(finite[over], checks[over][None] - checks[rows], 1)
        return jnp.where(finite[rows, None], d, -1)

    better, settled = criterion.test(gains(slice(m), m), n)
    best_learned = jnp.argmin(ranked[:m])
    row = jnp.where(better.any(), jnp.argmin(jnp.where(better, ranked[:m], jnp.inf)), m)
    best_fallback = jnp.int32(m)
    if len(checks) > m + 1:
        gain, _ = moments(gains(slice(m + 1, None), row), n)
        row = jnp.where(gain[0] >= 0, m + 1, row)
        best_fallback += ranked[m + 1] <= ranked[m]
    return Verdict(
        row=jnp.where(finite[row], row, NEITHER),
        settled=settled.all(),
        best_learned=best_learned,
        best_fallback=best_fallback,
        learned_loss=means[best_learned],
        fallback_loss=means[best_fallback],
        finite_learned=finite[:m].any(),
        finite_fallback=finite[best_fallback],
    )


def follow_first(sound: Bool[Array, " lanes"], dtype: jnp.dtype) -> Verdict:
    """Keep the first lane, unchecked, if it is sound."""
    nan, zero = jnp.array(jnp.nan, dtype), jnp.int32(0)
    row = jnp.where(sound[0], 0, NEITHER)
    return Verdict(row, jnp.array(True), zero, zero, nan, nan, jnp.array(True), sound[0])
