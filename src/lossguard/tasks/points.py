"""Classification of points in the plane: Spirals, Circles and Moons."""

import math
from functools import partial
from typing import Any

import numpy as np

from ..extras import needed
from ..validation import check_choice, check_count, check_real
from .dataset import POINT_SCALINGS, Dataset, make_dataset


def spirals(
    *,
    samples: int = 10_000,
    test_samples: int = 2_000,
    noise: float = 0.02,
    seed: int = 0,
    scaling: str = "none",
) -> Dataset:
    """Two interleaved Archimedean spirals, one class each, within about [-1, 1]^2.

    With u uniform on [0, 1], e standard normal in two dimensions and c the class, 0 or 1::

        r = sqrt(u),  a = 3 pi r + pi c,  x = r (cos a, sin a) + noise e

    so that the radius is proportional to the angle, and the root spreads the points evenly along
    the arms, but for the innermost turn. Each arm turns one and a half times; the arms are 1/3
    apart. Classes are balanced. The paper doesn't define its Spirals, and scikit-learn has none.

    Args:
        samples: points of the training split.
        test_samples: points of the test split.
        noise: deviation of each coordinate.
        seed: of all draws.
        scaling: "none" or "standardized".

    Raises:
        ValueError: if an argument is out of range.

    >>> data = spirals(samples=1_000, noise=0.0)
    >>> bool(abs(data.train.inputs).max() <= 1), data.train.labels.sum().item()
    (True, 500)
    """
    _check_points(samples, test_samples, noise, seed, scaling)
    rng = np.random.default_rng(seed)

    def arms(count: int) -> tuple[np.ndarray, np.ndarray]:
        label = np.arange(count) % 2
        radius = np.sqrt(rng.uniform(size=count))
        angle = 3 * np.pi * radius + np.pi * label
        arm = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return arm + noise * rng.standard_normal((count, 2)), label

    return _points("spirals", arms(samples), arms(test_samples), scaling)


def two_spirals(
    *,
    samples: int = 10_000,
    test_samples: int = 2_000,
    noise: float = 0.5,
    seed: int = 0,
    scaling: str = "none",
) -> Dataset:
    """Two interleaved spirals as a much copied function has them, within about [-14, 14]^2.

    With u uniform on [0, 1], e uniform on [0, 1] in two dimensions, c the class, and the angle of
    13 pi / 3, which is 780 degrees::

        a = 13 pi sqrt(u) / 3,  x = (1 - 2 c) (a (-cos a, sin a) + noise e)

    An arm's turns are 2 pi apart. Arguments and errors are those of
    ``spirals``, except ``noise``: the most that is added to a coordinate.
    """
    _check_points(samples, test_samples, noise, seed, scaling)
    rng = np.random.default_rng(seed)

    def arms(count: int) -> tuple[np.ndarray, np.ndarray]:
        label = np.arange(count) % 2
        angle = 13 * np.pi / 3 * np.sqrt(rng.uniform(size=count))
        arm = angle[:, None] * np.stack([-np.cos(angle), np.sin(angle)], axis=1)
        return (1 - 2 * label[:, None]) * (arm + noise * rng.uniform(size=(count, 2))), label

    return _points("two_spirals", arms(samples), arms(test_samples), scaling)


def circles(
    *,
    samples: int = 10_000,
    test_samples: int = 2_000,
    noise: float = 0.05,
    seed: int = 0,
    scaling: str = "none",
) -> Dataset:
    """Scikit-learn's ``make_circles``: a circle of radius 1 and one of radius 1/2 inside it.

    Arguments and errors are those of ``spirals``.
    """
    return _of_sklearn("circles", (samples, test_samples), noise, seed, scaling, factor=0.5)


def moons(
    *,
    samples: int = 10_000,
    test_samples: int = 2_000,
    noise: float = 0.1,
    seed: int = 0,
    scaling: str = "none",
) -> Dataset:
    """Scikit-learn's ``make_moons``: two interleaved half circles of radius 1.

    Arguments and errors are those of ``spirals``.
    """
    return _of_sklearn("moons", (samples, test_samples), noise, seed, scaling)


def _of_sklearn(
    name: str, sizes: tuple[int, int], noise: float, seed: int, scaling: str, **shape: float
) -> Dataset:
    """Two draws of its ``make_NAME``, with seeds of their own."""
    with needed(f"the data set {name}"):  # takes a second to import
        from sklearn import datasets

    _check_points(*sizes, noise, seed, scaling)
    seeds = np.random.SeedSequence(seed).generate_state(2)
    make = partial(getattr(datasets, f"make_{name}"), noise=noise, **shape)
    train, test = (make(n, random_state=int(s)) for n, s in zip(sizes, seeds, strict=True))
    return _points(name, train, test, scaling)


# scikit-learn's annotations are wider than what it returns.
def _points(name: str, train: tuple[Any, Any], test: tuple[Any, Any], scaling: str) -> Dataset:
    train, test = ((points.astype(np.float32), labels) for points, labels in (train, test))
    return make_dataset(train, test, scaling=scaling, largest=1, name=name, classes=2)


def _check_points(samples: int, test_samples: int, noise: float, seed: int, scaling: str) -> None:
    check_count("samples", samples, least=2)
    check_count("test_samples", test_samples, least=2)
    check_real("noise", noise, "at least 0 and finite", lambda v: 0 <= v < math.inf)
    check_count("seed", seed, least=0)
    check_choice("scaling", scaling, POINT_SCALINGS)
