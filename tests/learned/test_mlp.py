"""The MLP optimizer against its equations in NumPy, step by step."""

from typing import Any

import jax
import jax.numpy as jnp
import mlp_reference
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float, PyTree

from lossguard import MLPWeights, init_mlp_weights, mlp_optimizer

STEPS = 12
SHAPES = [(), (1,), (7,), (5, 3), (3, 5), (4, 4), (1, 6), (3, 3, 4, 8), (6, 2, 3), (50, 2)]


@pytest.fixture(scope="session")
def mlp_weights() -> MLPWeights:
    """Of outputs that are large enough to be seen, with biases and moved decays."""
    weights = init_mlp_weights(jax.random.key(0))
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.02 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
    return tree.unflatten([w + n for w, n in zip(leaves, noise, strict=True)])


def random_gradients(shape: tuple[int, ...], size: float = 1.0) -> Float[Array, "steps ..."]:
    """Of sizes that differ between coordinates, some always zero."""
    rng = np.random.default_rng(len(shape))
    scale = np.exp(rng.uniform(-6, 1, shape)) * rng.choice([0, 1, 1, 1], shape)
    return jnp.asarray(size * scale * rng.normal(0.3, 1, (STEPS, *shape)), jnp.float32)


def updates_of(
    optimizer: optax.GradientTransformation, params: PyTree, gradients: PyTree
) -> tuple[PyTree, PyTree]:
    """The updates, [steps, ...], and the state after them."""

    def step(carry: tuple[PyTree, Any], gradient: PyTree) -> tuple[Any, PyTree]:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (_, state), updates = jax.lax.scan(step, (params, optimizer.init(params)), gradients)
    return updates, state


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_equations(mlp_weights: MLPWeights, shape: tuple[int, ...], size: float) -> None:
    p = np.random.default_rng(0).normal(size=shape)
    gradients = random_gradients(shape, size)
    ours, _ = updates_of(mlp_optimizer(mlp_weights), jnp.asarray(p, jnp.float32), gradients)
    memory = mlp_reference.start(p)
    for k, gradient in enumerate(np.asarray(gradients)):
        update, memory = mlp_reference.step(mlp_weights, memory, gradient, p)
        p = p + update
        np.testing.assert_allclose(ours[k], update, rtol=2e-4, atol=1e-7)
