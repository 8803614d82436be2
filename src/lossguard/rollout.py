"""The one inner loop: guard steps, compiled into a scan."""

import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .guards.protocol import Decision, Guard, GuardState, Objective
from .validation import check_count, check_kind

KEPT = 8
"""Compiled loops, and so objectives and the data that their functions hold."""


@lru_cache(maxsize=KEPT)
def _loop_of(
    guard: Guard, static: Hashable, types: Hashable, tree: Any, most: int
) -> Callable[..., Any]:
    """The loop in a buffer for ``most`` decisions; of the objective all but its arrays.

    With the types of its leaves, since 1 and True are equal and not the same.
    """

    @partial(jax.jit, donate_argnums=2)
    def loop(arrays: list[Any], cycles: Any, state: GuardState) -> tuple[GuardState, Decision]:
        objective = tree.unflatten(eqx.combine(arrays, [*static]))  # pyright: ignore
        step = jax.jit(lambda state: guard.step(state, objective))  # traced once for both uses
        _, shapes = jax.eval_shape(step, state)
        none = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)

        def body(cycle: Any, carry: tuple[GuardState, Decision]) -> tuple[GuardState, Decision]:
            state, decision = step(carry[0])
            put = jax.tree.map(lambda out, leaf: out.at[cycle].set(leaf), carry[1], decision)
            return state, put

        return jax.lax.fori_loop(0, cycles, body, (state, none))

    return loop


def rollout(
    guard: Guard, state: GuardState, objective: Objective, *, cycles: int, most: int | None = None
) -> tuple[GuardState, Decision]:
    """``cycles`` steps of a guard in one compiled loop; nothing leaves the device inside.

    Args:
        guard: any guard. Use the same object again to use its compiled code again.
        state: where to start. Its buffers are donated: use the returned state from then on.
        objective: ``objective(params, i)``. If it is a pytree, its arrays are arguments of the
            compiled code, which serves other data of the same shapes too. What a function holds is
            read when it is compiled: data that change must be a pytree's.
        cycles: how many steps of the guard, each a cycle.
        most: compile for up to so many cycles, so that calls with fewer use the same code; by
            default for ``cycles``.

    Returns:
        The state after them, and their decisions stacked on an axis of length ``cycles``.

    Raises:
        ValueError: if guard or state is no such thing, cycles or most is not an integer of at least
            1 or is above 2^31 - 1, or cycles is above most, or the objective can't be hashed.

    >>> import jax.numpy as jnp, lossguard, optax
    >>> guard = lossguard.unguarded(optax.sgd(0.1))
    >>> state = guard.init(jnp.ones(2))
    >>> state, decisions = rollout(guard, state, lambda params, i: jnp.sum(params**2), cycles=3)
    >>> int(state.steps), decisions.losses.shape
    (30, (3, 10))
    """
    check_kind("guard", guard, Guard, "recommended(learned, fallback)")
    check_kind("state", state, GuardState, "guard.init(params)")
    leaves = [leaf for leaf in jax.tree.leaves(state) if not isinstance(leaf, Tracer)]
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        raise ValueError("state must be the one that was returned last, got one given away")
    cycles = check_count("cycles", cycles)
    most = cycles if most is None else check_count("most", most)
    if cycles > most:
        raise ValueError(f"cycles must be at most {most}, got {cycles}")
    parts, tree = jax.tree.flatten(objective)
    arrays, static = eqx.partition(parts, eqx.is_array)
    try:
        loop = _loop_of(guard, (*static,), (*map(type, static),), tree, most)
    except TypeError as error:
        try:
            hash(guard)
        except TypeError as of_guard:
            raise ValueError(f"guard must be of hashable functions, got {of_guard}") from error
        raise ValueError(
            "objective must be hashable, or a pytree (jax.tree_util.Partial, equinox.Module), got "
            f"{type(objective).__name__}: {error}"
        ) from error
    count = jax.device_put(np.int32(cycles))
    with warnings.catch_warnings():  # under vmap a count of all seeds has no place in one of each
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        state, decisions = loop(arrays, count, _own(state, objective))
    if cycles < most:
        decisions = jax.tree.map(lambda leaf: _first(leaf, cycles), decisions)
    return state, decisions


def _first(leaf: Any, count: int) -> Any:
    """Its first so many entries; cut on the host if it is there, or each count is compiled."""
    if isinstance(leaf, Tracer) or not leaf.is_fully_addressable:
        return leaf[:count]
    of_one = len(leaf.sharding.device_set) == 1
    return jax.device_put(np.asarray(leaf)[:count], leaf.sharding if of_one else None)


def _own(state: GuardState, objective: Objective) -> GuardState:
    """The state, each leaf in a buffer of its own, which can be donated."""
    taken = {id(leaf) for leaf in jax.tree.leaves(objective)}

    def own(leaf: Any) -> Any:
        if id(leaf) in taken:
            return jnp.copy(leaf)
        taken.add(id(leaf))
        return leaf

    return jax.tree.map(own, state)
