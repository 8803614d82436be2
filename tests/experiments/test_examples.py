"""The examples of experiments are what they say."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lossguard.command_line import find_recipe
from lossguard.experiments import Experiment

FILE = Path(__file__).parents[2] / "examples" / "convnet_readings.py"


@pytest.mark.parametrize(
    ("reading", "activation", "padding", "features"),
    [
        ("sigmoid", jax.nn.sigmoid, (0, 0, 0), 128),
        ("tanh", jax.numpy.tanh, (0, 0, 0), 128),
        ("padded", jax.nn.relu, (2, 1, 1), 512),
    ],
)
def test_readings_of_the_convnet(reading, activation, padding, features) -> None:
    """Against XLA's own convolutions."""
    _, e = find_recipe([f"{FILE}:{reading}"], {}, "run", Experiment)
    x = jax.random.normal(jax.random.key(0), (2, 28, 28, 1))
    *layers, head = params = e.model.init((28, 28, 1), 10, jax.random.key(1))
    expected = x
    for layer, p in zip(layers, padding, strict=True):
        expected = jax.lax.conv_general_dilated(
            expected,
            layer.weight,
            (2, 2),
            ((p, p), (p, p)),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        expected = activation(expected + layer.bias[:, 0, 0])
    expected = expected.reshape(2, features) @ head.weight.T + head.bias
    np.testing.assert_allclose(e.model.apply(params, x), expected, rtol=1e-4, atol=1e-5)
