"""Line 16 of Algorithm 2, over lanes: which of those that were checked is kept."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .criteria import Criterion

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

    The fallback's lanes are compared by their means (s wins ties), and each learned lane with the
    better of them by the criterion. Lanes that are not ``sound``, or whose losses are not finite,
    can't win.
    """
    means = jnp.where(jnp.arange(checks.shape[1]) < n, checks, 0).sum(axis=1) / n
    finite = sound & jnp.isfinite(means)
    ranked = jnp.where(finite, means, jnp.inf)
    best_fallback = len(means) - 1 - jnp.argmin(ranked[m:][::-1])  # s comes last

    difference = checks[best_fallback] - checks[:m]
    difference = jnp.where(finite[best_fallback], difference, 1)
    difference = jnp.where(finite[:m, None], difference, -1)
    better, settled = criterion.test(difference, n)
    best_learned = jnp.argmin(ranked[:m])
    best_better = jnp.argmin(jnp.where(better, ranked[:m], jnp.inf))
    otherwise = jnp.where(finite[best_fallback], best_fallback, NEITHER)
    return Verdict(
        row=jnp.where(better.any(), best_better, otherwise),
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
