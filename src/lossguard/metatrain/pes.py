"""Persistent evolution strategies: a meta-gradient without bias from rollouts cut into pieces.

Letters: theta the weights of a learned optimizer; N pairs of inner problems; s the state of one,
which one piece of its rollout takes to the next; e a perturbation, normal of deviation sigma.

Plain evolution strategies over a piece see what a change of theta does within that piece alone.
Here a pair goes on from where its own perturbations have brought it, and the loss of a piece is
credited to the sum x of all perturbations since the rollout began:

    x <- x + e;   L+, s+ <- piece(theta + e, s+);   L-, s- <- piece(theta - e, s-)
    gradient = mean over pairs of x (L+ - L-) / (2 sigma^2)

Summed over the pieces of a rollout it is, in the mean, the gradient of the sum of their losses,
smoothed by the perturbations.

Source: Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs
with persistent evolution strategies", ICML 2021, algorithm 2.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ..guards.soundness import select

Weights = TypeVar("Weights")
Piece = Callable[[Weights, PyTree], tuple[Float[Array, ""], PyTree]]
"""``piece(weights, inner) -> loss, inner``: the next piece of a rollout of one inner problem."""


class Pairs(NamedTuple):
    """N pairs of inner problems under way."""

    plus: PyTree[Array]
    """[N, ...]: the states that theta + e has led to."""
    minus: PyTree[Array]
    """[N, ...]: the states that theta - e has led to."""
    walked: PyTree[Float[Array, "N ..."]]
    """x, of the shapes of theta: the sum of the perturbations since the rollout began."""


def start_pairs(weights: PyTree, inner: PyTree) -> Pairs:
    """Pairs at the start of the rollouts of N inner problems, the leading axis of ``inner``."""
    count = jax.tree.leaves(inner)[0].shape[0]
    zeros = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), weights)
    return Pairs(inner, inner, zeros)


def restart_pairs(pairs: Pairs, fresh: Pairs, done: Bool[Array, " N"]) -> Pairs:
    """Each pair whose rollout is over replaced by a fresh one, whose perturbations sum up to 0."""
    return jax.vmap(select)(done, fresh, pairs)


def pes_gradient(
    piece: Piece, weights: Weights, pairs: Pairs, key: PRNGKeyArray, *, sigma: float
) -> tuple[Float[Array, "2 N"], Weights, Pairs]:
    """The losses of the next piece of all pairs, the estimated gradient, and the pairs after it.

    Args:
        piece: one piece of the rollout of one inner problem; it is vmapped over pairs.
        weights: theta, a pytree of arrays of real numbers.
        pairs: where the inner problems are.
        key: draws the perturbations.
        sigma: their deviation, the same for every weight.

    Returns:
        The losses under theta + e and theta - e, the gradient in the shapes of theta, and the pairs
        after the piece. Those whose rollout is over are the caller's to restart.

    >>> def piece(rate, x):  # one step of gradient descent on x^2 / 2
    ...     x = x - rate * x
    ...     return x**2 / 2, x
    >>> pairs = start_pairs(jnp.float32(0.1), jnp.ones(1000))
    >>> losses, gradient, pairs = pes_gradient(
    ...     piece, jnp.float32(0.1), pairs, jax.random.key(0), sigma=0.01
    ... )
    >>> bool(abs(gradient + 0.9) < 0.1)  # d/d rate of (1 - rate)^2 / 2
    True
    """
    count = jax.tree.leaves(pairs.walked)[0].shape[0]
    e = optax.tree.scale(sigma, optax.tree.random_like(key, pairs.walked))
    walked = jax.tree.map(jnp.add, pairs.walked, e)

    def run(sign: Array, inner: PyTree) -> tuple[Array, PyTree]:
        perturbed = jax.tree.map(lambda w, step: w + (sign * step).astype(w.dtype), weights, e)
        return jax.vmap(piece)(perturbed, inner)

    ours = jax.tree.map(lambda plus, minus: jnp.stack([plus, minus]), pairs.plus, pairs.minus)
    losses, after = jax.vmap(run)(jnp.array([1.0, -1.0]), ours)
    slope = (losses[0] - losses[1]) / (2 * sigma**2)
    gradient = jax.tree.map(
        lambda x: (jnp.tensordot(slope, x, axes=1) / count).astype(x.dtype), walked
    )
    plus, minus = (jax.tree.map(lambda leaf, k=k: leaf[k], after) for k in (0, 1))
    return losses, gradient, Pairs(plus, minus, walked)
