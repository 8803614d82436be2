"""The guard that we would use: the loss guard with what did best in our experiments."""

from typing import Any

from .criteria import paired_criterion
from .loss_guard import loss_guard
from .probing import backoff
from .protocol import Guard


def recommended(learned: Any, fallback: Any, *, nt: int = 10, nc: int = 10) -> Guard:
    """A hedged loss guard that keeps its gains under noise and backs off where there are none.

    x goes back to the fallback's own path on evidence only, a learned lane that lost begins anew,
    and after 30 losses running it is probed ever less often. Where a few hard examples make up the
    loss, evidence may never come, and x stay behind: ``loss_guard(hedge=True)`` goes back by means
    (docs/results.md has a case).

    Args:
        learned: the optimizer that is not trusted, or several, as ``loss_guard`` takes them.
        fallback: the one that is.
        nt: optimizer steps a cycle.
        nc: check minibatches a cycle, at least 2.

    Raises:
        ValueError: as ``loss_guard``.

    >>> import jax.numpy as jnp, optax
    >>> guard = recommended(optax.sgd(3.0), optax.sgd(0.1))
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> int(decision.winner)  # the fallback, on its own path
    2
    """
    return loss_guard(
        learned,
        fallback,
        nt=nt,
        nc=nc,
        hedge=paired_criterion(confidence=0.95),
        loser="reset",
        probing=backoff(patience=30, most=512, start="reset"),
    )
