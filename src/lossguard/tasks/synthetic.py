"""Problems with known answers: the minimum, mu, L and the variance of the gradient are all given.

Letters: w the iterate, w* the minimum, n its dimension, f the loss, E(w) = f(w) - f(w*) the
excess, mu and L the strong convexity and the smoothness of f. Arrays have JAX's default
floating-point type, which is float64 if ``jax_enable_x64`` is set.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy import optimize
from scipy.special import expit

from ..validation import check_count, check_positive, check_real


class Quadratic(eqx.Module):
    """f(w) = 1/2 sum_j lambda_j <r_j, w - w*>^2, whose minimum is 0. Made by ``quadratic``."""

    rotation: Float[Array, "n n"]
    """Its columns r_j are the eigenvectors of the Hessian."""
    eigenvalues: Float[Array, " n"]
    """lambda_j, ascending."""
    minimum: Float[Array, " n"]
    """w*."""

    @property
    def mu(self) -> Float[Array, ""]:
        """The smallest eigenvalue of the Hessian."""
        return self.eigenvalues[0]

    @property
    def L(self) -> Float[Array, ""]:
        """The largest."""
        return self.eigenvalues[-1]

    def excess(self, params: Float[Array, " n"]) -> Float[Array, ""]:
        """E(w); here f(w*) = 0, so that nothing cancels near the minimum."""
        return jnp.sum(self.eigenvalues * ((params - self.minimum) @ self.rotation) ** 2) / 2

    def __call__(self, params: Float[Array, " n"], i: Int[Array, ""] | int = 0) -> Float[Array, ""]:
        """f(w), whatever the minibatch."""
        return self.excess(params)


class RidgeLogistic(eqx.Module):
    """f(w) = mean_j log(1 + exp(-b_j <a_j, w>)) + mu/2 ||w||^2. Made by ``ridge_logistic``."""

    inputs: Float[Array, "samples n"]
    """a_j."""
    labels: Float[Array, " samples"]
    """b_j, 1 or -1."""
    minimum: Float[Array, " n"]
    """w*."""
    mu: Float[Array, ""]
    """The factor of the ridge, which is the strong convexity."""
    L: Float[Array, ""]
    """mu + the largest eigenvalue of mean_j a_j a_j^T / 4: log(1 + exp) curves by at most 1/4."""

    def excess(self, params: Float[Array, " n"]) -> Float[Array, ""]:
        """E(w); within a few roundings of f, so that it may be below 0 by as much."""
        return self(params) - self(self.minimum)

    def __call__(self, params: Float[Array, " n"], i: Int[Array, ""] | int = 0) -> Float[Array, ""]:
        """f(w), whatever the minibatch."""
        losses = jax.nn.softplus(-self.labels * (self.inputs @ params))
        return losses.mean() + self.mu / 2 * jnp.sum(params**2)


class Noisy(eqx.Module):
    """A problem whose gradient on minibatch number i is right on the mean, and off by sigma:

        F(w, i) = f(w) + sigma / sqrt(n) <xi_i, w - w*>,   xi_i standard normal, drawn from (key, i)

    So grad F(w, i) has the mean grad f(w), the variance E ||grad F - grad f||^2 is sigma^2 at every
    w, and different minibatches are independent. A pytree: ``Noisy(problem=None, key=0,
    sigma=None)`` are the axes along which many seeds are vmapped.

    Args:
        problem: what it is without noise.
        key: of the noise.
        sigma: deviation of the whole gradient, not of a coordinate.

    >>> problem = Noisy(quadratic(jax.random.key(0)), jax.random.key(1), sigma=2.0)
    >>> w = jnp.ones(10)
    >>> gradients = jax.vmap(jax.grad(problem), (None, 0))(w, jnp.arange(10_000))
    >>> variance = jnp.sum((gradients - jax.grad(problem.problem)(w)) ** 2, axis=1).mean()
    >>> bool(abs(variance - 4.0) < 0.1)
    True
    """

    problem: Quadratic | RidgeLogistic
    key: PRNGKeyArray
    sigma: Float[Array, ""] | float

    @property
    def minimum(self) -> Float[Array, " n"]:
        """w* of f."""
        return self.problem.minimum

    @property
    def mu(self) -> Float[Array, ""]:
        """The strong convexity of f."""
        return self.problem.mu

    @property
    def L(self) -> Float[Array, ""]:
        """The smoothness of f."""
        return self.problem.L

    def excess(self, params: Float[Array, " n"]) -> Float[Array, ""]:
        """E(w) of f, without noise."""
        return self.problem.excess(params)

    def __call__(self, params: Float[Array, " n"], i: Int[Array, ""] | int) -> Float[Array, ""]:
        """F(w, i)."""
        key = jax.random.fold_in(self.key, jnp.asarray(i, jnp.int32))
        xi = jax.random.normal(key, params.shape, params.dtype)
        slope = self.sigma / params.size**0.5 * jnp.sum(xi * (params - self.minimum))
        return self.problem(params) + slope.astype(params.dtype)


def quadratic(
    key: PRNGKeyArray, *, n: int = 10, mu: float = 0.1, L: float = 1.0, distance: float = 1.0
) -> Quadratic:
    """A quadratic in n dimensions, its eigenvalues spaced evenly in the logarithm from mu to L.

    Args:
        key: of the rotation and of the direction of w*.
        n: dimension.
        mu: the smallest eigenvalue.
        L: the largest.
        distance: ||w*||, from 0.

    Raises:
        ValueError: if n is below 2, or not 0 < mu <= L, or L or distance is infinite, or distance
            is below 0.

    >>> problem = quadratic(jax.random.key(0), n=3, mu=0.01, L=1.0)
    >>> float(problem.mu), float(problem.L), float(problem(problem.minimum))
    (0.009999999776482582, 1.0, 0.0)
    """
    check_count("n", n, least=2)
    check_positive(L=L)
    check_real("distance", distance, "at least 0 and finite", lambda v: 0 <= v < np.inf)
    check_real("mu", mu, f"above 0 and at most L = {L}", lambda v: 0 < v <= L)
    rotation_key, minimum_key = jax.random.split(key)
    direction = jax.random.normal(minimum_key, (n,))
    return Quadratic(
        rotation=jax.random.orthogonal(rotation_key, n),
        eigenvalues=jnp.asarray(np.geomspace(mu, L, n), direction.dtype),
        minimum=distance * direction / jnp.linalg.norm(direction),
    )


def ridge_logistic(
    key: PRNGKeyArray, *, n: int = 5, samples: int = 100, mu: float = 0.1, flipped: float = 0.1
) -> RidgeLogistic:
    """Logistic regression of random labels on normal inputs, with a ridge.

    Args:
        key: of the data.
        n: dimension.
        samples: points.
        mu: factor of the ridge.
        flipped: share of the labels, on average, that a linear rule would not give.

    Raises:
        ValueError: if n or samples is below 1, mu is not positive, or flipped is not in [0, 1].

    >>> problem = ridge_logistic(jax.random.key(0))
    >>> bool(jnp.linalg.norm(jax.grad(problem)(problem.minimum)) < 1e-6)
    True
    """
    check_count("n", n)
    check_count("samples", samples)
    check_positive(mu=mu)
    flipped = check_real("flipped", flipped, "between 0 and 1", lambda v: 0 <= v <= 1)
    input_key, rule_key, flip_key = jax.random.split(key, 3)
    inputs = jax.random.normal(input_key, (samples, n))
    labels = jnp.where(inputs @ jax.random.normal(rule_key, (n,)) > 0, 1.0, -1.0)
    labels = jnp.where(jax.random.bernoulli(flip_key, flipped, (samples,)), -labels, labels)

    a = np.asarray(inputs, np.float64)
    curvature = np.linalg.eigvalsh(a.T @ a / samples)[-1] / 4
    return RidgeLogistic(
        inputs=inputs,
        labels=labels,
        minimum=jnp.asarray(_ridge_minimum(a, np.asarray(labels, np.float64), mu), inputs.dtype),
        mu=jnp.asarray(mu, inputs.dtype),
        L=jnp.asarray(mu + curvature, inputs.dtype),
    )


def _ridge_minimum(a: np.ndarray, b: np.ndarray, mu: float) -> np.ndarray:
    """Where the gradient of the ridge logistic loss vanishes, in float64."""

    def gradient(w: np.ndarray) -> np.ndarray:
        return mu * w - a.T @ (b * expit(-b * (a @ w))) / len(b)

    def hessian(w: np.ndarray) -> np.ndarray:
        p = expit(a @ w)
        return mu * np.eye(len(w)) + (a.T * (p * (1 - p))) @ a / len(b)

    return optimize.root(gradient, np.zeros(a.shape[1]), jac=hessian, tol=1e-14).x
