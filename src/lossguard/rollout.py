"""The one inner loop: guard steps, compiled into a scan."""

from typing import Any

import equinox as eqx
import jax

from .guards.protocol import Decision, Guard, GuardState, Objective


@eqx.filter_jit(donate="all-except-first")
def _donating(static: tuple, state: GuardState) -> tuple[GuardState, Decision]:
    guard, objective, cycles, axes = static

    def rollout_one(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        return jax.lax.scan(lambda s, _: guard.step(s, objective), state, length=cycles)

    if axes is None:
        return rollout_one(state, objective)
    return jax.vmap(rollout_one, in_axes=(0, axes))(state, objective)


def rollout(
    guard: Guard, state: GuardState, objective: Objective, *, cycles: int, axes: Any = None
) -> tuple[GuardState, Decision]:
    """``cycles`` steps of a guard in one compiled loop; nothing leaves the device inside.

    Args:
        guard: any guard. Use the same object again to use its compiled code again.
        state: where to start. Its buffers are donated: use the returned state from then on.
        objective: ``objective(params, i)``. If it is a pytree, its arrays are arguments of the
            compiled code, which serves other data of the same shapes too.
        cycles: how many steps of the guard, each a cycle.
        axes: for several seeds at once, the objective's axes as ``jax.vmap`` takes them (such as
            ``Objective(task=None, key=0)``); ``state`` then has a leading axis everywhere.

    Returns:
        The state after them, and their decisions stacked on an axis of length ``cycles`` (after the
        axis of the seeds, if any).

    >>> import jax.numpy as jnp, lossguard, optax
    >>> guard = lossguard.unguarded(optax.sgd(0.1))
    >>> state = guard.init(jnp.ones(2))
    >>> state, decisions = rollout(guard, state, lambda params, i: jnp.sum(params**2), cycles=3)
    >>> int(state.steps), decisions.losses.shape
    (30, (3, 10))
    """
    return _donating((guard, objective, cycles, axes), state)
