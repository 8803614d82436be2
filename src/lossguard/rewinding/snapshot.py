"""A point that one can go back to, and one that has yet to prove itself.

What is damaged is damaged before the loss shows it. So a point is a candidate first, and becomes
trusted only after the run has stayed good for a while: its probation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from ..guards.protocol import Params


class Snapshots(NamedTuple):
    """Two copies of a point: any pytree of arrays."""

    slots: tuple[PyTree, PyTree]
    """The trusted one, where one goes back to, and the candidate, which becomes trusted if its
    probation goes well. Which is which changes then, so that nothing is copied."""
    second: Bool[Array, ""]
    """Whether the second one is trusted."""
    pending: Bool[Array, ""]
    """Whether there is a candidate. If not, its place holds anything."""

    @property
    def trusted(self) -> PyTree:
        """Where one goes back to."""
        first, second = self.slots
        return jax.lax.cond(self.second, lambda: second, lambda: first)


def way_back(point: Params, params: Params, like: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
    """The update, of the types of ``like``, from ``params`` to a point; and whether it gets there.

    Rounding misses the point if ``params`` are far larger. A second update from there gets to it.
    """
    move = jax.tree.map(
        lambda s, p, u: jnp.where(s == p, 0, s.astype(u.dtype) - p.astype(u.dtype)),
        *(point, params, like),
    )
    landed = optax.apply_updates(params, move)
    same = jax.tree.map(lambda a, b: (a == b).all(), landed, point)
    return move, jnp.array(jax.tree.leaves(same)).all()


def only_if(
    condition: Bool[Array, ""], change: Callable[..., PyTree], tree: PyTree, *given: PyTree
) -> PyTree:
    """``change(tree, *given)`` where the condition holds, else the tree.

    A loop of one round or none. Unlike ``lax.cond`` it doesn't copy the tree if there is none. What
    it computes from is handed in: of what a loop closes over XLA computes ahead of it, each time.
    """

    barrier = jax.lax.optimization_barrier
    return jax.lax.fori_loop(
        0, condition.astype(int), lambda k, tree: change(tree, *barrier((k, given))[1]), tree
    )
