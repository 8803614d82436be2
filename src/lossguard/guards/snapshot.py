"""A point that one can go back to, and one that has yet to prove itself.

What is damaged is damaged before the loss shows it. So a point is a candidate first, and becomes
trusted only after the run has stayed good for a while: its probation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


class Snapshots(NamedTuple):
    """Two copies of a point: any pytree of arrays."""

    trusted: PyTree
    """Where one goes back to."""
    candidate: PyTree
    """What becomes trusted if its probation goes well."""
    pending: Bool[Array, ""]
    """Whether there is a candidate. If not, its place holds anything."""


def first(point: PyTree) -> Snapshots:
    """The start is trusted, and there is no candidate."""
    return Snapshots(point, point, jnp.array(False))


def end_probation(snapshots: Snapshots, point: PyTree, passed: Bool[Array, ""]) -> Snapshots:
    """Make the candidate trusted if it passed, and ``point`` the candidate."""
    trusted = jax.lax.cond(passed, lambda: snapshots.candidate, lambda: snapshots.trusted)
    return Snapshots(trusted, point, jnp.array(True))
