"""Points in the plane: on the curves that they are said to be on, and drawn from the seed alone."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lossguard.tasks.points import circles, moons, spirals, two_spirals

LOADERS = [spirals, two_spirals, circles, moons]


def arrays(split) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(split.inputs), np.asarray(split.labels)


@pytest.mark.parametrize("load", LOADERS)
def test_default_sizes_types_and_balance(load) -> None:
    data = load()
    assert data.name == load.__name__ and data.classes == 2 and data.note == ""
    assert data.train.inputs.shape == (10_000, 2) and data.test.inputs.shape == (2_000, 2)
    assert data.train.inputs.dtype == jnp.float32 and data.train.labels.dtype == jnp.int32
    assert data.train.labels.sum() == 5_000 and data.test.labels.sum() == 1_000


@pytest.mark.parametrize("load", LOADERS)
def test_the_seed_decides_and_the_splits_differ(load) -> None:
    first, again = load(samples=50, seed=3), load(samples=50, seed=3)
    other = load(samples=50, test_samples=50, seed=4)
    np.testing.assert_array_equal(first.train.inputs, again.train.inputs)
    np.testing.assert_array_equal(first.test.inputs, again.test.inputs)
    assert not np.array_equal(first.train.inputs, other.train.inputs)
    assert not np.array_equal(other.train.inputs, other.test.inputs)


@pytest.mark.parametrize("load", LOADERS)
def test_the_training_split_does_not_depend_on_the_size_of_the_other(load) -> None:
    small, large = load(samples=50, test_samples=10), load(samples=50, test_samples=90)
    np.testing.assert_array_equal(small.train.inputs, large.train.inputs)


def test_spirals_lie_on_arms_whose_radius_is_proportional_to_the_angle() -> None:
    points, labels = arrays(spirals(noise=0.0).train)
    radius = np.hypot(*points.T)
    angle = np.arctan2(points[:, 1], points[:, 0])
    difference = angle - (3 * np.pi * radius + np.pi * labels)
    np.testing.assert_allclose(np.exp(1j * difference), 1, atol=1e-3)
    assert radius.max() <= 1 + 1e-6
    assert np.mean(radius < 0.5) == pytest.approx(0.25, abs=0.02)  # r = sqrt(u)


def test_two_spirals_are_those_of_the_function_that_is_copied() -> None:
    """Radius and angle are one number, to 780 degrees; the second arm is the first one turned."""
    points, labels = arrays(two_spirals(noise=0.0).train)
    radius = np.hypot(*points.T)
    first = np.where(labels[:, None] == 0, points, -points)
    expected = np.stack([-np.cos(radius) * radius, np.sin(radius) * radius], axis=1)
    np.testing.assert_allclose(first, expected, atol=1e-4)
    assert radius.max() == pytest.approx(np.deg2rad(780), rel=1e-3)
    assert np.mean(radius < radius.max() / 2) == pytest.approx(0.25, abs=0.02)
    added = arrays(two_spirals(noise=0.5).train)[0] * (1 - 2 * labels[:, None]) - first
    assert added.min() > -1e-5 and added.max() < 0.5 + 1e-5
    np.testing.assert_allclose(added.mean(axis=0), 0.25, atol=0.01)


def test_circles_have_the_radii_1_and_a_half() -> None:
    data = circles(noise=0.0)
    for points, labels in map(arrays, (data.train, data.test)):
        np.testing.assert_allclose(np.hypot(*points.T), np.where(labels == 0, 1, 0.5), atol=1e-6)


def test_moons_are_half_circles() -> None:
    points, labels = arrays(moons(noise=0.0).train)
    centre = np.where(labels[:, None] == 0, [0.0, 0.0], [1.0, 0.5])
    np.testing.assert_allclose(np.hypot(*(points - centre).T), 1, atol=1e-6)


@pytest.mark.parametrize("load", [spirals, circles, moons])
def test_both_splits_have_the_noise(load) -> None:
    clean, noisy = load(noise=0.0), load(noise=0.1)
    for split in ("train", "test"):
        difference = getattr(noisy, split).inputs - getattr(clean, split).inputs
        np.testing.assert_allclose(difference.std(0), 0.1, rtol=0.05)


@pytest.mark.parametrize("load", LOADERS)
def test_scaling(load) -> None:
    raw, scaled = load(), load(scaling="standardized")
    np.testing.assert_array_equal(raw.normalize(raw.train.inputs), raw.train.inputs)
    np.testing.assert_array_equal(raw.train.inputs, scaled.train.inputs)
    np.testing.assert_allclose(scaled.normalize(scaled.train.inputs).std(0), 1, rtol=1e-4)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples must be an integer of at least 2, got 1"),
        ({"test_samples": 0}, "test_samples must be an integer of at least 2, got 0"),
        ({"samples": 10.5}, "samples must be an integer of at least 2, got 10.5"),
        ({"noise": -0.1}, "noise must be at least 0 and finite, got -0.1"),
        ({"noise": float("nan")}, "noise must be at least 0 and finite, got nan"),
        ({"noise": float("inf")}, "noise must be at least 0 and finite, got inf"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"scaling": "unit"}, "scaling must be one of none, standardized, got 'unit'"),
    ],
)
def test_bad_arguments_are_named(load, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(**options)
    assert str(caught.value) == message
