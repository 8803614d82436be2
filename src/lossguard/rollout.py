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

from .guards.protocol import Decision, Guard, GuardState, Loss
from .validation import check_count, check_kind

KEPT = 8
"""Compiled loops, and so objectives and the data that their functions hold."""


@lru_cache(maxsize=KEPT)
def _loop_of(
    guard: Guard, static: Hashable, types: Hashable, tree: Any, most: int
) -> Callable[..., Any]:
    """The loop in a buffer for ``most`` decisions; of loss and minibatches all but their arrays.

    With the types of its leaves, since 1 and True are equal and not the same.
    """

    @partial(jax.jit, donate_argnums=2)
    def loop(arrays: list[Any], cycles: Any, state: GuardState) -> tuple[GuardState, Decision]:
        loss, minibatches = tree.unflatten(eqx.combine(arrays, [*static]))  # pyright: ignore

        @jax.jit  # traced once for both uses
        def step(state: GuardState, cycle: Any) -> tuple[GuardState, Decision]:
            if minibatches is None or callable(minibatches):
                number = state.minibatches // guard.per_cycle
                given = None if minibatches is None else minibatches(number)
            else:
                first, count = cycle * guard.per_cycle, guard.per_cycle
                cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=count)
                given = jax.tree.map(cut, minibatches)
            return guard.step(state, loss, given)

        _, shapes = jax.eval_shape(step, state, 0)
        none = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)

        def body(cycle: Any, carry: tuple[GuardState, Decision]) -> tuple[GuardState, Decision]:
            state, decision = step(carry[0], cycle)
            put = jax.tree.map(lambda out, leaf: out.at[cycle].set(leaf), carry[1], decision)
            return state, put

        return jax.lax.fori_loop(0, cycles, body, (state, none))

    return loop


def rollout(
    guard: Guard,
    state: GuardState,
    loss: Loss,
    minibatches: Any = None,
    *,
    cycles: int | None = None,
    most: int | None = None,
) -> tuple[GuardState, Decision]:
    """Steps of a guard in one compiled loop; nothing leaves the device inside.

    Args:
        guard: any guard. Use the same object again to use its compiled code again.
        state: where to start. Its buffers are donated: use the returned state from then on.
        loss: as a step of the guard takes it (``Guard``). If it is a pytree, its arrays are
            arguments of the compiled code, which serves other data of the same shapes too. What a
            function holds is read when it is compiled: data that change must be a pytree's.
        minibatches: a pytree of arrays whose first axis are the minibatches, in their order, of
            whole cycles of ``guard.per_cycle``. Or a function from the number of a cycle of the run
            to its minibatches. None: a minibatch is its number, from ``state.minibatches`` on.
        cycles: how many steps of the guard, each a cycle. Arrays say it by themselves.
        most: compile for up to so many cycles, so that calls with fewer use the same code; by
            default for ``cycles``.

    Returns:
        The state after them, and their decisions stacked on an axis of length ``cycles``.

    Raises:
        ValueError: if guard or state is no such thing, cycles or most is not an integer of at least
            1 or is above 2^31 - 1, or cycles is above most, the minibatches are not those of
            ``cycles`` cycles, or loss or minibatches can't be hashed.

    >>> import jax.numpy as jnp, lossguard, optax
    >>> guard = lossguard.unguarded(optax.sgd(0.1))
    >>> data = jnp.ones((30, 8, 2))  # 30 minibatches of 8 examples
    >>> loss = lambda params, x: jnp.mean((x - params) ** 2)
    >>> state, decisions = rollout(guard, guard.init(jnp.zeros(2)), loss, data)
    >>> int(state.steps), decisions.losses.shape
    (30, (3, 10))
    """
    check_kind("guard", guard, Guard, "recommended(learned, fallback)")
    check_kind("state", state, GuardState, "guard.init(params)")
    leaves = [leaf for leaf in jax.tree.leaves(state) if not isinstance(leaf, Tracer)]
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        raise ValueError("state must be the one that was returned last, got one given away")
    if minibatches is not None and not callable(minibatches):
        held = _cycles_in(minibatches, guard.per_cycle)
        minibatches = jax.tree.map(jnp.asarray, minibatches)
        if cycles not in (None, held):
            raise ValueError(f"cycles must be {held}, of which minibatches are, got {cycles!r}")
        cycles = held
        if most not in (None, held):
            raise ValueError("most must go with minibatches that are a function, got arrays")
    if cycles is None:
        raise ValueError("cycles must be given, unless minibatches are arrays")
    cycles = check_count("cycles", cycles)
    most = cycles if most is None else check_count("most", most)
    if cycles > most:
        raise ValueError(f"cycles must be at most {most}, got {cycles}")
    parts, tree = jax.tree.flatten((loss, minibatches))
    arrays, static = eqx.partition(parts, eqx.is_array)
    try:
        loop = _loop_of(guard, (*static,), (*map(type, static),), tree, most)
    except TypeError as error:
        try:
            hash(guard)
        except TypeError as of_guard:
            raise ValueError(f"guard must be of hashable functions, got {of_guard}") from error
        raise ValueError(
            "loss and minibatches must be hashable, or pytrees (jax.tree_util.Partial, "
            f"equinox.Module), got {type(loss).__name__}: {error}"
        ) from error
    count = jax.device_put(np.int32(cycles))
    with warnings.catch_warnings():  # under vmap a count of all seeds has no place in one of each
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        state, decisions = loop(arrays, count, _own(state, arrays))
    if cycles < most:
        decisions = jax.tree.map(lambda leaf: _first(leaf, cycles), decisions)
    return state, decisions


def _first(leaf: Any, count: int) -> Any:
    """Its first so many entries; cut on the host if it is there, or each count is compiled."""
    if isinstance(leaf, Tracer) or not leaf.is_fully_addressable:
        return leaf[:count]
    of_one = len(leaf.sharding.device_set) == 1
    return jax.device_put(np.asarray(leaf)[:count], leaf.sharding if of_one else None)


def _cycles_in(minibatches: Any, per_cycle: int) -> int:
    """How many cycles the minibatches of arrays are of; refuse what isn't whole ones."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(minibatches)}
    counts = sorted(length[0] if length else 0 for length in lengths)
    if len(counts) != 1 or counts[0] == 0 or counts[0] % per_cycle:
        raise ValueError(
            "minibatches must be a function, or arrays whose first axis are those of whole cycles, "
            f"a multiple of {per_cycle}, got {counts or 'no arrays'}"
        )
    return counts[0] // per_cycle


def _own(state: GuardState, arrays: list[Any]) -> GuardState:
    """The state, each leaf in a buffer of its own, which can be donated."""
    taken = {id(leaf) for leaf in arrays}

    def own(leaf: Any) -> Any:
        if id(leaf) in taken:
            return jnp.copy(leaf)
        taken.add(id(leaf))
        return leaf

    return jax.tree.map(own, state)
