"""When does x go back to the fallback's own path? A rule over training losses.

Every loss before an optimizer step is on a minibatch that the parameters have not seen, so what a
lane's training losses say of it is honest, and free (progressive validation: Blum, Kalai and
Langford, COLT 1999).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class TrackRecord(NamedTuple):
    """How x's training losses have compared with those of s, the fallback on its own path."""

    decay: float

    def update(
        self,
        excess: Float[Array, ""],
        kept: Float[Array, " most"],
        own: Float[Array, " most"],
        steps: Int[Array, ""] | int,
    ) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        """The excess after a cycle, and whether x goes back to s.

        ``kept`` and ``own`` are the losses of the branch that x would follow and of s, of which the
        first ``steps`` count. A branch whose losses are not finite is worse than one with finite
        ones.
        """
        counts = jnp.arange(len(own)) < steps
        kept, own = (jnp.where(counts, losses, 0).sum() for losses in (kept, own))
        known = jnp.isfinite(own)
        now = self.decay * excess + jnp.where(known, kept - own, 0).astype(excess.dtype)
        return now, known & ~((now <= 0) & jnp.isfinite(now))


def track_record(*, decay: float = 0.9) -> TrackRecord:
    """Go back where x's training losses of late sum up to more than the fallback's alone.

        D <- decay D + sum_t [F(x's branch, i+t) - F(s, i+t)],    over the nt steps of a cycle
        x <- s, D <- 0   if D > 0

    So D remembers about 1 / (1 - decay) cycles. While x is off the fallback's own path D <= 0: of
    late, its training losses were no higher than the fallback's alone, on the very minibatches. A
    learned lane leaves that path if the check and the cycle's training losses speak for it. Where a
    few hard examples make up the loss, a cycle's minibatches alone can't tell; a record can.

    Raises:
        ValueError: if decay is not at least 0 and below 1.

    >>> import optax
    >>> from lossguard import loss_guard
    >>> guard = loss_guard(optax.sgd(3.0), optax.sgd(0.1), hedge=track_record(decay=0.9))
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1, got {decay!r}")
    return TrackRecord(decay)
