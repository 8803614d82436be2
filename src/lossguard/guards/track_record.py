"""When does a guard follow the fallback's own path? A rule over training losses.

Every loss before an optimizer step is on a minibatch that the parameters have not seen, so what a
lane's training losses say of it is honest, and free (progressive validation: Blum, Kalai and
Langford, COLT 1999).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..validation import check_decay, check_share


class Excess(NamedTuple):
    """By how much x's training losses were higher than those of s since it left that path."""

    total: Float[Array, ""]
    """D, the discounted sum over all cycles."""
    worst: Float[Array, ""]
    """W, the largest of its terms, at least 0."""
    recent: Float[Array, ""]
    """R, the same sum with the shortest memory; s is given out where it is above 0."""
    cycles: Int[Array, ""]
    """a, since x left."""


class TrackRecord(NamedTuple):
    """How x's training losses are compared with those of s, the fallback on its own path."""

    decay: float
    share: float

    def update(
        self,
        excess: Excess,
        kept: Float[Array, " most"],
        own: Float[Array, " most"],
        steps: Int[Array, ""] | int,
        on_own: Bool[Array, ""],
    ) -> tuple[Excess, Bool[Array, ""]]:
        """The excess after a cycle, and whether x goes back to s, or does not leave it.

        ``kept`` and ``own`` are the losses of the branch that x would follow and of s, of which the
        first ``steps`` count. A branch whose losses are not finite is worse than one with finite
        ones.
        """
        counts = jnp.arange(len(own)) < steps
        kept, own = (jnp.where(counts, losses, 0).sum() for losses in (kept, own))
        known = jnp.isfinite(own)
        d = jnp.where(known, kept - own, 0).astype(excess.total.dtype)
        a = excess.cycles + 1
        remembered = jnp.maximum(self.share * a.astype(d.dtype), 1)
        decay = jnp.maximum(self.decay, 1 - 1 / remembered)
        total = decay * excess.total + d
        worst = jnp.maximum(decay * excess.worst, d)
        recent = jnp.where(known, self.decay * excess.recent + d, 0)
        fine = (total <= jnp.where(on_own, 0, worst)) & jnp.isfinite(total)
        return Excess(total, worst, recent, a), known & ~fine


def track_record(*, decay: float = 0.9, share: float = 0.1) -> TrackRecord:
    """Follow the fallback alone while x's recent training losses are higher, or go back to it.

    In cycle a since x left the path of s:

        rho <- max(decay, 1 - 1 / (share a))
        d <- sum_t [F(x's branch, i+t) - F(s, i+t)],    over the nt steps of a cycle
        R <- decay R + d
        D <- rho D + d;  W <- max(rho W, d)
        x <- s, R, D, W, a <- 0   if D > W;     the guard gives out s   if R > 0,   else x

    Giving out s forfeits nothing, as x goes on beside it, so that it needs no patience: R remembers
    about 1 / (1 - decay) cycles. In every run, at any time, the losses that the guard reports sum
    up to no more than those of s, and no more than those of x.

    Going back forfeits what was gained, so that a long lead is not given up for a few cycles: D
    remembers in time the last ``share`` of those since x left. It is never given up for one, as s
    must be ahead even without the cycle that was the worst for x. A learned lane leaves the
    fallback's own path if the check speaks for it and d <= 0. Where a few hard examples make up the
    loss, a cycle's minibatches alone can't tell; a record can.

    Args:
        decay: of R, and the least that rho may be.
        share: of the cycles since x left the path of s, which D remembers in time; 0: D is R.

    Raises:
        ValueError: if decay is not above 0 and below 1, or share not at least 0 and below 1.

    >>> import optax
    >>> from lossguard import loss_guard
    >>> guard = loss_guard(optax.sgd(3.0), optax.sgd(0.1), hedge=track_record(decay=0.9))
    """
    return TrackRecord(check_decay(decay), check_share(share))
