"""A guard whose losses are measured as those of published baselines were."""

import jax
import jax.numpy as jnp

from ..guards.protocol import Decision, Guard, GuardState, Objective, following
from ..validation import check_count


def watched(guard: Guard, *, batches: int = 5) -> Guard:
    """The guard; its decisions report the loss before the cycle on minibatches of their own.

    They are the next ones in the order, and are left out of training: so each is as long ago as
    the next that is trained on. The mean over them stands in each of ``decision.losses``. What
    they cost is not counted.

    Args:
        guard: any guard.
        batches: minibatches before each cycle.

    Raises:
        ValueError: if batches is not an integer of at least 1.

    >>> import lossguard, optax
    >>> guard = watched(lossguard.unguarded(optax.sgd(0.1), nt=2), batches=3)
    >>> state = guard.init(jnp.ones(1))
    >>> state, decision = guard.step(state, lambda params, i: jnp.sum(params**2) + i)
    >>> decision.losses.tolist(), int(state.minibatches)  # of minibatches 0, 1, 2; then 3, 4
    ([2.0, 2.0], 5)
    """
    check_count("batches", batches)

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        own = state.minibatches + jnp.arange(batches)
        loss = jax.vmap(objective, (None, 0))(state.params, own).mean()
        state = state._replace(minibatches=following(state.minibatches, batches))
        after, decision = guard.step(state, objective)
        return after, decision._replace(losses=jnp.full_like(decision.losses, loss))

    return Guard(guard.init, step)
