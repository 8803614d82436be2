"""The examples of experiments are what they say."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from lossguard.command_line import find_recipe
from lossguard.experiments import Experiment

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *options: str):
    """The experiment of a recipe in examples/, as the command line makes it."""
    _, e = find_recipe([f"{EXAMPLES}/{name}", *options], {}, "run", Experiment)
    return e


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
    e = example(f"convnet_readings.py:{reading}")
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


def test_arms_with_turns_and_a_radius_of_ones_choice() -> None:
    e = example("spirals_readings.py:arms")
    data = e.make_task(replace(e, turns=2.0, radius=3.0, noise=0.0)).dataset
    radius, angle = polar(data.normalize(data.train.inputs)[data.train.labels == 0])
    assert 2.9 < radius.max() <= 3
    np.testing.assert_allclose(np.cos(angle), np.cos(2 * np.pi * 2 * radius / 3), rtol=0, atol=1e-4)


def test_unscaled_arms() -> None:
    """Their radius is their angle, up to 780 degrees."""
    e = example("spirals_readings.py:unscaled")
    data = e.make_task(replace(e, noise=0.0)).dataset
    radius, angle = polar(data.normalize(data.train.inputs)[data.train.labels == 0])
    assert 13.5 < radius.max() <= np.radians(780)
    np.testing.assert_allclose(np.cos(angle), np.cos(radius), rtol=0, atol=1e-3)


def test_twins_begin_a_rounding_error_apart() -> None:
    guards = example("twins.py:of_adam").guards()
    start = np.random.default_rng(0).normal(size=100).astype(np.float32)
    begins = [np.asarray(guard.init(start).params) for guard in guards.values()]
    np.testing.assert_array_equal(begins[0], start)
    np.testing.assert_allclose(begins, [start] * 5, rtol=1.1e-6)
    assert len({begin.tobytes() for begin in begins}) == 5


def polar(points):
    """The radius and the angle of points [n, 2]."""
    return np.linalg.norm(points, axis=1), np.arctan2(points[:, 1], points[:, 0])
