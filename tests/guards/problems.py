"""Problems that several of the guards' tests share: one of them numpy_guards', as JAX has it."""

import jax
import jax.numpy as jnp
import numpy_guards

from lossguard.tasks import quadratic, ridge_logistic


def objective_of(problem: numpy_guards.Objective, xi: jax.Array | None = None):
    """Its loss, with its own noise or another."""
    a, m = jnp.asarray(problem.a), jnp.asarray(problem.m)
    xi = jnp.asarray(problem.xi) if xi is None else xi
    return lambda w, i: 0.5 * jnp.sum(a * (w - m) ** 2) + xi[i] @ w


def noisy(problem, key: jax.Array, sigma: float, minibatches: int):
    """F of ``Noisy``, but its noise is drawn beforehand: inside, it takes long to compile.

    The last of the minibatches may be numbered -1, -2, ... instead.
    """
    n = problem.minimum.size
    xi = sigma / n**0.5 * jax.random.normal(key, (minibatches, n))
    return lambda w, i: problem(w) + xi[i] @ (w - problem.minimum)


def decay(rate: float):
    """The schedule of both sides."""
    return lambda k: rate / (1 + 0.025 * k)


CONVEX = {
    "quadratic": lambda: quadratic(jax.random.key(0), n=6, mu=0.05, L=2.0, distance=3.0),
    "ridge": lambda: ridge_logistic(jax.random.key(0), n=4, samples=50, mu=0.1),
}
"""Their minimum is known. Made where they are used, in that test's precision."""


def valleys(w: jax.Array, i: jax.Array | int = 0) -> jax.Array:
    """Not convex, and without noise."""
    return jnp.sum(w**2 / 20 + 1 - jnp.cos(3 * w))


def trap(w: jax.Array, i: jax.Array | int = 0) -> jax.Array:
    """Right of 0 the loss soon is 0.3 for ever; left of it it falls to 0, slowly."""
    return jnp.where(w > 0, jnp.maximum(1 - w, 0.3), jnp.maximum(1 + w / 10, 0))
