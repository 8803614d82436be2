"""The data set type: scaling is what it says, and it passes through JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lossguard.tasks import MLP, Dataset, Split, Task
from lossguard.tasks.dataset import make_dataset


def pixels(largest: int) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, largest + 1, (50, 4, 5, 3), dtype=np.uint8)
    images[..., 1] //= 2
    images[0, 0, 0], images[0, 0, 1] = 0, largest
    return images


def made(inputs: np.ndarray, scaling: str, largest: int = 255):
    labels = np.arange(len(inputs)) % 2
    return make_dataset(
        (inputs, labels),
        (inputs[:4], labels[:4]),
        scaling=scaling,
        largest=largest,
        name="made",
        classes=2,
    )


def test_ones_own_may_be_of_numpy_arrays() -> None:
    split = Split(np.zeros((8, 2), np.float32), np.arange(8) % 2)  # pyright: ignore
    data = Dataset(split, split, 0.0, 1.0, name="mine", classes=2)  # pyright: ignore
    task = Task(data, MLP(hidden=(3,)), batch_size=4)
    objective = task.objective(jax.random.key(0))
    loss = jax.jit(objective)(task.init(jax.random.key(1)), 0)
    assert jnp.isfinite(loss) and data.train.labels.dtype == jnp.int32


def test_whole_numbers_beyond_32_bits_do_not_wrap() -> None:
    """Inputs become floats; labels are refused."""
    split = Split(np.array([[2**40 + 5, 1_700_000_000_000]]), np.array([0]))  # pyright: ignore
    np.testing.assert_allclose(split.inputs, [[2.0**40, 1.7e12]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"^labels must fit into 32 bits, got 0 to 4294967296$"):
        Split(np.zeros((2, 1)), np.array([0, 2**32]))  # pyright: ignore
    with pytest.raises(ValueError, match=r"^inputs must be real, got complex ones$"):
        Split(np.ones((1, 1), complex), np.array([0]))  # pyright: ignore


@pytest.mark.parametrize("largest", [16, 255])
@pytest.mark.parametrize(("scaling", "low"), [("unit", 0.0), ("symmetric", -1.0)])
def test_pixels_are_mapped_to_the_interval(scaling: str, low: float, largest: int) -> None:
    inputs = pixels(largest)
    data = made(inputs, scaling, largest)
    scaled = data.normalize(data.train.inputs)
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, low + (1 - low) * inputs / largest, atol=1e-6)


def test_standardized_pixels_have_mean_0_and_deviation_1_per_channel() -> None:
    inputs = pixels(255)
    data = made(inputs, "standardized")
    np.testing.assert_allclose(data.offset, inputs.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(1 / data.scale, inputs.std((0, 1, 2)), rtol=1e-6)


def test_every_input_has_a_label() -> None:
    reason = r"^labels must be as many as inputs \(3, 2\), got \(4,\)$"
    with pytest.raises(ValueError, match=reason):
        Split(np.zeros((3, 2), np.float32), np.zeros(4, np.int32))


def test_what_does_not_differ_is_not_standardized() -> None:
    for points in (np.full((4, 2), 3.7), np.stack([np.zeros(4), np.arange(4.0)], axis=1)):
        with pytest.raises(ValueError, match=r"^inputs must differ in each channel or coordinate"):
            made(points.astype(np.float32), "standardized")


def test_it_is_stored_raw_and_normalized_inside_compiled_code() -> None:
    data = made(pixels(255), "unit")
    assert data.train.inputs.dtype == jnp.uint8 and data.train.labels.dtype == jnp.int32
    assert data.shape == (4, 5, 3)
    one_by_one = jax.jit(jax.vmap(data.normalize))(data.train.inputs)
    passed_in = jax.jit(lambda data: data.normalize(data.train.inputs))(data)
    np.testing.assert_allclose(one_by_one, data.normalize(data.train.inputs), rtol=1e-6)
    np.testing.assert_allclose(passed_in, data.normalize(data.train.inputs), rtol=1e-6)
