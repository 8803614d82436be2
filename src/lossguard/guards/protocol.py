"""What every guard is: two pure functions, the state between them, and what a step reports."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..validation import check_kind

Params = PyTree[Shaped[ArrayLike, "..."]]
Objective = Callable[[Any, Any], Array]
"""``objective(params, i)``: the scalar loss on minibatch number i, which may be ignored."""


LEARNED, FALLBACK, OWN, NEITHER = 0, 1, 2, -1
"""``Decision.winner``: the learned optimizer's lane, the fallback's from x, the fallback's own; or
x stayed, or went back."""
LAST = 2**31 - 1
"""The largest count of 32 bits."""


class GuardState(NamedTuple):
    """Where a guard stands between two cycles."""

    params: Params
    """The parameters to evaluate and to save. What is put here from outside is gone on from."""
    steps: Int[Array, ""]
    """k, optimizer steps taken so far (int32; it stays at 2^31 - 1)."""
    minibatches: Int[Array, ""]
    """The number of the next minibatch (int32; near 2^31 - 1 it begins at 0 again)."""
    inner: PyTree
    """What the guard itself keeps: optimizer states and the like."""


class Decision(NamedTuple):
    """What happened in one cycle. Losses are NaN, and flags true, where they do not apply."""

    used_learned: Bool[Array, " nt"]
    """Whether each step of the lane that ``losses`` are of was the learned optimizer's."""
    losses: Float[Array, " nt"]
    """Training loss before each step. Of which lane, the guard says: of the leader before the
    cycle, or, with hindsight, of the branch that was kept."""
    learned_loss: Float[Array, ""]
    """Mean loss by which the learned lane was compared."""
    fallback_loss: Float[Array, ""]
    """That of the fallback's on the same minibatches."""
    finite_learned: Bool[Array, ""]
    """Whether the learned lane had finite parameters and losses."""
    finite_fallback: Bool[Array, ""]
    """Whether the fallback's had."""
    winner: Int[Array, ""]
    """The lane that ``params`` are of after the cycle: 0 learned, 1 fallback, 2 the fallback by
    itself, -1 where x stayed or went back; with ``best_of`` the number of the guard."""
    gradients: Int[Array, ""]
    """Gradient evaluations spent."""
    forwards: Int[Array, ""]
    """Forward passes spent beside them."""
    learned_updates: Int[Array, ""]
    """Updates computed by learned optimizers, kept or not."""

    def price(self, u: float = 0.0) -> Array | np.ndarray:
        """Gradients + forward passes / 3 + learned updates times u: what was spent, in gradients.

        Args:
            u: the measured cost of one learned update in gradients of the task; 0: not counted.
        """
        return self.gradients + self.forwards / 3 + u * self.learned_updates


class Guard(NamedTuple):
    """``init(params) -> state`` and ``step(state, objective) -> (state, decision)``, both pure.

    One step is one cycle; jit, vmap and scan work on it.
    """

    init: Callable[[Params], GuardState]
    step: Callable[[GuardState, Objective], tuple[GuardState, Decision]]


def as_arrays(params: Params) -> Params:
    """The leaves as arrays whose types a loop can carry.

    Raises:
        ValueError: if there is no leaf, or one is not floating-point.
    """
    if not jax.tree.leaves(params):
        raise ValueError(f"params must hold at least one array, got {params!r}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_number = isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex)
        dtype = jnp.result_type(leaf) if is_number else repr(leaf)
        if not (is_number and jnp.issubdtype(dtype, jnp.floating)):
            name = jax.tree_util.keystr(path) or "itself"
            raise ValueError(
                f"params must be floating-point arrays, but its leaf {name} is {dtype}"
            )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), params)


@jax.jit
def own_buffers(tree: PyTree) -> PyTree:
    """Each leaf in a buffer of its own, which may be donated, on the devices of those put anywhere.

    It is of the type that a step returns: a weak type would have the second step compiled again.
    """

    def own(leaf: Array) -> Array:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jnp.copy(leaf) if is_key else jnp.array(leaf, leaf.dtype)

    return jax.tree.map(lambda leaf: own(jnp.asarray(leaf)), tree)


def check_state(state: Any, inner: type = object) -> None:
    """Refuse what is no state, or has another kind of ``inner``."""
    check_kind("state", state, GuardState, "guard.init(params)")
    if not isinstance(state.inner, inner):
        raise ValueError(
            f"state must be of this guard's own init(params), whose inner is a {inner.__name__}, "
            f"got {state.inner!r}"
        )


def advance(count: Int[Array, "..."], by: Int[Array, ""] | int) -> Int[Array, "..."]:
    """Counts of steps after ``by`` more; they stay at the largest number."""
    return jnp.where(count > LAST - by, LAST, count + by).astype(jnp.int32)


def following(i: Int[Array, ""], by: int) -> Int[Array, ""]:
    """The number of the minibatch ``by`` later; 0 if a cycle from there would pass the largest."""
    return jnp.where(i > LAST - 2 * by, 0, i + by).astype(jnp.int32)


def with_extra_args(name: str, optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer in the form that accepts ``value=`` and the like, and drops what it can't use.

    ``grad_fn=`` goes to optimizers that name it, such as optax's opaque SAM, and to no others: the
    line searches of optax refuse it.
    """
    if not (callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update")):
        raise ValueError(f"{name} must be an optax GradientTransformation, got {optimizer!r}")
    inner = optax.with_extra_args_support(optimizer)
    named = inspect.signature(inner.update).parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in named.values())

    def update(
        updates: PyTree, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        usable = {
            key: value
            for key, value in extra_args.items()
            if key in named or (open_ended and key != "grad_fn")
        }
        return inner.update(updates, state, params, **usable)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def loss_dtype(objective: Objective, params: Params, i: Int[Array, ""]) -> jnp.dtype:
    """The dtype in which losses are kept and compared: the objective's, float32 at least.

    Raises:
        ValueError: if the objective does not return one floating-point number.
    """
    out = jax.eval_shape(objective, params, i)
    check_loss("objective", out)
    return jnp.promote_types(out.dtype, jnp.float32)


def sum_dtype(params: Params) -> jnp.dtype:
    """The dtype of what a guard adds up or follows over cycles: the widest, float32 at least."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(params))


def check_loss(name: str, loss: Any) -> None:
    """Refuse what is not one floating-point number, or the shape of one, in one sentence."""
    shape, dtype = getattr(loss, "shape", None), getattr(loss, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must return a scalar floating-point loss, got {loss}")
