"""Which parameters, states and gradients are finite."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from .protocol import wide

select = optax.tree.where
"""``select(condition, yes, no)``: one tree or the other, leaf by leaf."""


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point number in a pytree is finite."""
    return is_sound(tree, lambda: jax.tree.map(lambda _: 0.0, tree))


def is_sound(tree: PyTree, like: Callable[[], PyTree]) -> Bool[Array, ""]:
    """Whether each number of a pytree is finite that is finite in ``like()``, where it began.

    Others may be anything: a state's best loss so far begins at infinity, what it doesn't know yet
    is NaN, and among parameters there are masks. ``like`` is computed if need be.
    """

    def exactly() -> Array:
        rows = zip(jax.tree.leaves(tree), jax.tree.leaves(like()), strict=True)
        fine = [(jnp.isfinite(a) | ~jnp.isfinite(b)).all() for a, b in rows if _is_float(a)]
        return jnp.array(fine).all()

    # By sums, in a third of the time. One of which a part isn't finite isn't either; it may also
    # have overflown.
    leaves = filter(_is_float, jax.tree.leaves(tree))
    sums = [leaf.sum(dtype=wide(leaf.dtype)) for leaf in leaves]
    finite = jnp.isfinite(jnp.array(sums)).all()
    return jax.lax.cond(finite, lambda: finite, exactly)


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
