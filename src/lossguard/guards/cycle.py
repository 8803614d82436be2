"""One cycle of a guard: what its lanes are run on, and what all guards do around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, PyTree

from ..validation import check_count, check_function, check_kind
from .protocol import Decision, Guard, GuardState, Objective, Params, advance, check_loss, following
from .soundness import plain
from .stacked import check_stacked

LONGEST = 10**6
"""Minibatches of a cycle, at most: their losses are kept, and counted several times in 32 bits."""
LEAST_BITS = 16
"""Of a parameter: JAX refuses to add numbers of 8 bits to wider ones."""


class Cycle(NamedTuple):
    """The minibatches of a cycle, i .. i+nt-1, and the objective that they are of."""

    objective: Objective
    i: Int[Array, ""]
    k: Int[Array, ""]
    """Optimizer steps before it."""
    nt: int


def guard_of(
    begin: Callable[[Params], PyTree],
    cycle: Callable[[Params, Any, Cycle], tuple[Params, PyTree, Decision]],
    *,
    nt: int,
    nc: int = 0,
) -> Guard:
    """The guard that keeps what ``begin`` makes beside x, of which ``cycle`` makes the next.

    A cycle takes nt optimizer steps, and nt + nc minibatches.
    """
    nt = check_count("nt", nt, most=LONGEST)

    def init(params: Params) -> GuardState:
        params = as_arrays(params)
        return own_buffers(GuardState(params, jnp.int32(0), jnp.int32(0), begin(params)))

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        check_state(state, init)
        given = plain(objective)  # the same for all members of best_of: JAX traces it once
        check_stacked(given, nt + nc)
        i, k = state.minibatches, state.steps
        check_objective(given, state.params, i)
        x, after, decision = cycle(state.params, state.inner, Cycle(objective, i, k, nt))
        decision = jax.tree.map(jnp.asarray, decision)
        return GuardState(x, advance(k, nt), following(i, nt + nc), after), decision

    return Guard(init, step)


def as_arrays(params: Params) -> Params:
    """The leaves as arrays whose types a loop can carry; refuse none, and what is no float.

    A start that is NaN stays NaN whatever is done, so it is refused, unless it is traced. Infinite
    ones are let in: masks are.
    """
    if not jax.tree.leaves(params):
        raise ValueError(f"params must hold at least one array, got {params!r}")
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path) or "itself"
        is_number = isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex)
        dtype = jnp.result_type(leaf) if is_number else repr(leaf)
        if not (is_number and jnp.issubdtype(dtype, jnp.floating)):
            raise ValueError(
                f"params must be floating-point arrays, but its leaf {name} is {dtype}"
            )
        if jnp.finfo(dtype).bits < LEAST_BITS:
            raise ValueError(
                f"params must be of {LEAST_BITS} bits at least, in which JAX can compute, but its "
                f"leaf {name} is {dtype}"
            )
        if isinstance(leaf, Tracer):
            continue
        with jax.ensure_compile_time_eval():  # of a constant within a transformation
            is_nan = bool(jnp.isnan(jnp.asarray(leaf)).any())
        if is_nan:
            raise ValueError(f"params must not be NaN at the start, but its leaf {name} is")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), params)


@jax.jit
def own_buffers(tree: PyTree) -> PyTree:
    """Each leaf in a buffer of its own, which may be donated, on the devices of those put anywhere.

    It is of the type that a step returns: a weak type would have the second step compiled again.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), tree)


def check_state(state: Any, init: Callable[[Params], GuardState]) -> None:
    """Refuse what is no state, is another guard's, or has parameters of other shapes or types."""
    check_kind("state", state, GuardState, "guard.init(params)")
    if kinds(state.inner) != kinds(jax.eval_shape(init, state.params).inner):
        raise ValueError(
            "state must be of this guard's own init(params), with its optimizers and the shapes "
            f"and types of those params, got another one, with {kinds(state.params)} now"
        )


def kinds(tree: PyTree) -> list[str]:
    """The place, type and shape of each leaf. What is static may differ: each init may make it."""
    leaves = [(jax.tree_util.keystr(at), leaf) for at, leaf in jax.tree.leaves_with_path(tree)]
    return [f"{at} {jnp.result_type(x)}{[*jnp.shape(x)]}".lstrip() for at, x in leaves]


def check_objective(
    objective: Objective, params: Params, i: Int[Array, ""], *, name: str = "objective"
) -> None:
    """Refuse what is no function, or doesn't return one floating-point number."""
    check_function(name, objective, f"{name}(params, i)")
    check_loss(name, jax.eval_shape(objective, params, i))
