"""No guard: one optimizer under the protocol of the guards, for comparison with them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from .cycle import Cycle, guard_of
from .lanes import Lane, train, with_extra_args
from .losses import Point
from .protocol import FALLBACK, LEARNED, Decision, Guard


def unguarded(optimizer: Any, *, nt: int = 10, trusted: bool = False) -> Guard:
    """One optimizer on its own; a step is nt of its steps, on minibatches i .. i+nt-1.

    Nothing is checked: parameters may become infinite.

    Args:
        optimizer: an optax transformation.
        nt: optimizer steps a cycle.
        trusted: whether it counts as the fallback in decisions, not as learned: ``used_learned`` is
            false then, and there are no ``learned_updates``. So ``best_of`` of a learned optimizer
            and a trusted one tells which of them it follows.

    Raises:
        ValueError: if nt is below 1.

    >>> import optax
    >>> guard = unguarded(optax.sgd(0.1))
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> int(state.steps), int(state.minibatches), float(decision.losses[0])
    (10, 10, 2.0)
    """
    optimizer = with_extra_args("optimizer", optimizer)

    def begin(x: Point) -> PyTree:
        return optimizer.init(x.params)

    def cycle(x: Point, state: PyTree, now: Cycle) -> tuple[Point, PyTree, Decision]:
        (lane,), (report,) = train([optimizer], [Lane(x, state)], now)
        decision = Decision(
            used_learned=jnp.full(now.nt, not trusted),
            losses=report.losses,
            winner=jnp.int32(FALLBACK if trusted else LEARNED),
            gradients=jnp.int32(now.nt),
            learned_updates=jnp.int32(0 if trusted else now.nt),
            aux=report.aux,
        )
        return lane.at, lane.state, decision

    return guard_of(begin, cycle, nt=nt)
