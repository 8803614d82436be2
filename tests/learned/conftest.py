"""A learned optimizer and gradients to feed it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from lossguard.learned.lstm import LSTMWeights, init_lstm_weights

STEPS, COORDINATES = 100, 37


@pytest.fixture(scope="session")
def weights() -> LSTMWeights:
    return init_lstm_weights(jax.random.key(0))


@pytest.fixture(scope="session")
def gradients() -> Float[Array, "steps n"]:
    """Of all sizes, zero included."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(-14, 4, (STEPS, COORDINATES)))
    return jnp.asarray(size * rng.choice([-1, 0, 1], size.shape), jnp.float32)
