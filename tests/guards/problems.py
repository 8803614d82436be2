"""The problem of numpy_guards as a JAX objective, and the schedule of both sides."""

import jax
import jax.numpy as jnp
import numpy_guards


def objective_of(problem: numpy_guards.Objective, xi: jax.Array | None = None):
    """Its loss, with its own noise or another."""
    a, m = jnp.asarray(problem.a), jnp.asarray(problem.m)
    xi = jnp.asarray(problem.xi) if xi is None else xi
    return lambda w, i: 0.5 * jnp.sum(a * (w - m) ** 2) + xi[i] @ w


def decay(rate: float):
    return lambda k: rate / (1 + 0.025 * k)
