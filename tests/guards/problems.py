"""Problems that several of the guards' tests share: one of them numpy_guards', as JAX has it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy_guards


def objective_of(problem: numpy_guards.Objective, xi: jax.Array | None = None):
    """Its loss, with its own noise or another."""
    a, m = jnp.asarray(problem.a), jnp.asarray(problem.m)
    xi = jnp.asarray(problem.xi) if xi is None else xi
    return lambda w, i: 0.5 * jnp.sum(a * (w - m) ** 2) + xi[i] @ w


class Convex(NamedTuple):
    """A loss f of which all is known that theorems speak of."""

    loss: Callable[[jax.Array], jax.Array]
    minimum: jax.Array
    """w*."""
    mu: jax.Array
    """Strong convexity: the least eigenvalue of a Hessian of f, or less."""
    L: jax.Array
    """Smoothness: the largest one, or more."""

    def excess(self, w: jax.Array) -> jax.Array:
        """f(w) - f(w*)."""
        return self.loss(w) - self.loss(self.minimum)

    def __call__(self, w: jax.Array, i: jax.Array | int = 0) -> jax.Array:
        return self.loss(w)


def quadratic(key: jax.Array, *, n: int, mu: float, L: float, distance: float) -> Convex:
    """Eigenvalues spaced evenly in the logarithm; a minimum of 0, so far from the origin."""
    rotation_key, minimum_key = jax.random.split(key)
    rotation, direction = jax.random.orthogonal(rotation_key, n), jax.random.normal(minimum_key, n)
    minimum = distance * direction / jnp.linalg.norm(direction)
    eigenvalues = jnp.asarray(np.geomspace(mu, L, n), direction.dtype)

    def loss(w):
        return jnp.sum(eigenvalues * ((w - minimum) @ rotation) ** 2) / 2

    return Convex(loss, minimum, eigenvalues[0], eigenvalues[-1])


def ridge_logistic(key: jax.Array, *, n: int, samples: int, mu: float) -> Convex:
    """Logistic regression of labels, a tenth of which a linear rule would not give, and a ridge."""
    input_key, rule_key, flip_key = jax.random.split(key, 3)
    a = jax.random.normal(input_key, (samples, n))
    b = jnp.where(a @ jax.random.normal(rule_key, (n,)) > 0, 1.0, -1.0)
    b = jnp.where(jax.random.bernoulli(flip_key, 0.1, (samples,)), -b, b)

    def loss(w):
        return jax.nn.softplus(-b * (a @ w)).mean() + mu / 2 * jnp.sum(w**2)

    w = jnp.zeros(n)
    for _ in range(10):  # Newton's method
        w -= jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w))
    curvature = jnp.linalg.eigvalsh(a.T @ a / samples)[-1] / 4  # log(1 + exp) curves by 1/4 at most
    return Convex(loss, w, jnp.asarray(mu), mu + curvature)


def noisy(problem: Convex, key: jax.Array, sigma: float, minibatches: int):
    """f(w) + sigma / sqrt(n) <xi_i, w - w*>, with xi_i standard normal.

    So gradients have the variance sigma^2 at every w. The noise is drawn beforehand: inside, it
    takes long to compile.
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
