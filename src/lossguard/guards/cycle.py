"""One cycle of a guard: what its lanes are run on, and what all guards do around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .protocol import (
    Decision,
    Guard,
    GuardState,
    Objective,
    Params,
    advance,
    as_arrays,
    check_state,
    following,
    loss_dtype,
    own_buffers,
)
from .stacked import check_stacked


class Cycle(NamedTuple):
    """The minibatches of a cycle, i .. i+nt-1, and the objective that they are of."""

    objective: Objective
    i: Int[Array, ""]
    k: Int[Array, ""]
    """Optimizer steps before it."""
    nt: int
    dtype: jnp.dtype
    """Of losses."""


def guard_of(
    begin: Callable[[Params], PyTree],
    cycle: Callable[[Params, Any, Cycle], tuple[Params, PyTree, Decision]],
    *,
    nt: int,
    nc: int = 0,
    inner: type = object,
) -> Guard:
    """The guard that keeps an ``inner`` beside x, of which ``cycle`` makes the next.

    A cycle takes nt optimizer steps, and nt + nc minibatches.
    """

    def init(params: Params) -> GuardState:
        params = as_arrays(params)
        return own_buffers(GuardState(params, jnp.int32(0), jnp.int32(0), begin(params)))

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        check_state(state, inner)
        check_stacked(objective, nt + nc)
        i, k = state.minibatches, state.steps
        dtype = loss_dtype(objective, state.params, i)
        now = Cycle(objective, i, k, nt, dtype)
        x, after, decision = cycle(state.params, state.inner, now)
        return GuardState(x, advance(k, nt), following(i, nt + nc), after), decision

    return Guard(init, step)
