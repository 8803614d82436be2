"""One cycle of a guard: what its lanes are run on, and what all guards do around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, PyTree

from ..validation import check_count, check_kind
from .losses import Point, check_loss
from .protocol import Decision, Guard, GuardState, Loss, Params, advance, following

LONGEST = 10**6
"""Minibatches of a cycle, at most: their losses are kept, and counted several times in 32 bits."""
LEAST_BITS = 16
"""Of a parameter: JAX refuses to add numbers of 8 bits to wider ones."""


class Cycle(NamedTuple):
    """What the lanes are run on in a cycle."""

    loss: Loss
    training: Any
    """nt minibatches: leaves have them on their first axis."""
    fresh: Any
    """nc minibatches of a check, likewise."""
    k: Int[Array, ""]
    """Optimizer steps before it."""
    nt: int
    told: PyTree
    """The shapes of what the loss reports beside itself."""


def guard_of(
    begin: Callable[[Point], PyTree],
    cycle: Callable[[Point, Any, Cycle], tuple[Point, PyTree, Decision]],
    *,
    nt: int,
    nc: int = 0,
) -> Guard:
    """The guard that keeps what ``begin`` makes beside x, of which ``cycle`` makes the next.

    A cycle takes nt optimizer steps, and nt + nc minibatches.
    """
    nt = check_count("nt", nt, most=LONGEST)
    per_cycle = nt + nc

    def init(params: Params, extra: PyTree = None) -> GuardState:
        x = Point(as_arrays(params), numbers_of(extra))
        zero = jnp.int32(0)
        return own_buffers(GuardState(x.params, zero, zero, begin(x), x.extra))

    def step(state: GuardState, loss: Loss, minibatches: Any = None) -> tuple[GuardState, Decision]:
        check_state(state, init)
        minibatches = of_cycle(state, minibatches, per_cycle)
        x = Point(state.params, state.extra)
        first = jax.tree.map(lambda leaf: leaf[0], minibatches)
        told = check_loss(loss, x, first)
        training = jax.tree.map(lambda leaf: leaf[:nt], minibatches)
        fresh = jax.tree.map(lambda leaf: leaf[nt:], minibatches)
        x, inner, decision = cycle(
            x, state.inner, Cycle(loss, training, fresh, state.steps, nt, told)
        )
        decision = jax.tree.map(jnp.asarray, decision)
        steps, number = advance(state.steps, nt), following(state.minibatches, per_cycle)
        return GuardState(x.params, steps, number, inner, x.extra), decision

    return Guard(init, step, per_cycle)


def of_cycle(state: GuardState, minibatches: Any, per_cycle: int) -> Any:
    """The minibatches of a cycle: those given, or their numbers."""
    if minibatches is None:
        return state.minibatches + jnp.arange(per_cycle, dtype=jnp.int32)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(minibatches)}
    if lengths != {(per_cycle,)}:
        found = sorted(str(*length) or "none" for length in lengths) or "no arrays"
        raise ValueError(
            f"minibatches must be arrays whose first axis are the {per_cycle} of a cycle, got "
            f"{found}"
        )
    return jax.tree.map(jnp.asarray, minibatches)


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


def numbers_of(extra: PyTree) -> PyTree:
    """Model state, if it is one: arrays of any type, random keys too."""
    for path, leaf in jax.tree.leaves_with_path(extra):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise ValueError(
                f"extra must be arrays, but its leaf {jax.tree_util.keystr(path) or 'itself'} is "
                f"{leaf!r}"
            )
    return extra


@jax.jit
def own_buffers(tree: PyTree) -> PyTree:
    """Each leaf in a buffer of its own, which may be donated, on the devices of those put anywhere.

    It is of the type that a step returns: a weak type would have the second step compiled again.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), tree)


def check_state(state: Any, init: Callable[..., GuardState]) -> None:
    """Refuse what is no state, is another guard's, or has parameters of other shapes or types."""
    check_kind("state", state, GuardState, "guard.init(params)")
    if kinds(state.inner) != kinds(jax.eval_shape(init, state.params, state.extra).inner):
        raise ValueError(
            "state must be of this guard's own init(params), with its optimizers and the shapes "
            f"and types of those params, got another one, with {kinds(state.params)} now"
        )


def kinds(tree: PyTree) -> list[str]:
    """The place, type and shape of each leaf. What is static may differ: each init may make it."""
    leaves = [(jax.tree_util.keystr(at), leaf) for at, leaf in jax.tree.leaves_with_path(tree)]
    return [f"{at} {jnp.result_type(x)}{[*jnp.shape(x)]}".lstrip() for at, x in leaves]
