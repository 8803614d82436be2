"""The guard that we would use: the loss guard with what did best in our experiments."""

from typing import Any

from .criteria import sequential_criterion
from .loss_guard import loss_guard
from .probing import backoff
from .protocol import Guard


def recommended(learned: Any, fallback: Any, *, nt: int = 10, nc: int = 10) -> Guard:
    """A hedged loss guard that decides under noise and backs off while the learned lanes lose.

    Args:
        learned: the optimizer that is not trusted, or several, as ``loss_guard`` takes them.
        fallback: the one that is.
        nt: optimizer steps a cycle.
        nc: check minibatches of a first look, which is doubled until the case is clear.

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
        hedge=True,
        criterion=sequential_criterion(confidence=0.8, first=nc, most=4 * nc),
        probing=backoff(patience=2, start="reset"),
    )
