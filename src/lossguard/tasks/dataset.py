"""What a classification data set is: two splits on the device, and how its inputs are scaled.

The data is stored raw (images as uint8, a quarter of the memory of float32) and scaled where a
minibatch of it is used. The paper doesn't state its scaling, which matters much, so that it is an
argument of every loader:

- "unit" maps the range of the pixels to [0, 1], "symmetric" maps it to [-1, 1];
- "standardized" gives mean 0 and deviation 1 over the training split, per channel or coordinate;
- "none" leaves points as they are.
"""

from functools import partial

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32, Int32, Shaped

from ..runs import checksums
from ..validation import MOST

_float32 = partial(jnp.asarray, dtype=jnp.float32)


def _inputs(inputs: ArrayLike) -> Array:
    """Numbers that JAX would cut to 32 bits become floats."""
    if np.iscomplexobj(inputs):
        raise ValueError("inputs must be real, got complex ones")
    wide = isinstance(inputs, np.ndarray) and inputs.dtype.kind in "iu" and inputs.itemsize > 4
    return jnp.asarray(inputs, jnp.float32) if wide else jnp.asarray(inputs)


def _labels(labels: ArrayLike) -> Array:
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" and labels.size:
        low, high = int(labels.min()), int(labels.max())
        if not -MOST <= low <= high <= MOST:
            raise ValueError(f"labels must fit into 32 bits, got {low} to {high}")
    return jnp.asarray(labels)


class Split(eqx.Module):
    """Examples and the class of each."""

    inputs: Shaped[Array, " n ..."] = eqx.field(converter=_inputs)
    """uint8 [N, H, W, C] images, channels last (float32 if resized), or float32 [N, d] points; not
    scaled."""
    labels: Int32[Array, " n"] = eqx.field(converter=_labels)
    """[N], in 0 .. classes - 1."""

    def __check_init__(self) -> None:
        of_inputs, of_labels = jnp.shape(self.inputs), jnp.shape(self.labels)
        if of_inputs[:1] != of_labels[:1]:
            raise ValueError(f"labels must be as many as inputs {of_inputs}, got {of_labels}")


class Dataset(eqx.Module):
    """A classification data set on the device.

    >>> from lossguard.tasks.points import moons
    >>> data = moons(samples=100, test_samples=20)
    >>> data.train.inputs.shape, data.shape, data.classes
    ((100, 2), (2,), 2)
    """

    train: Split
    test: Split
    offset: Float32[Array, "..."] = eqx.field(converter=_float32)
    """What ``normalize`` subtracts: a scalar, or one number per channel or coordinate."""
    scale: Float32[Array, "..."] = eqx.field(converter=_float32)
    """What it multiplies with then."""
    name: str = eqx.field(static=True)
    classes: int = eqx.field(static=True)
    note: str = eqx.field(static=True, default="")
    """What a figure must say about the data where it isn't the original, as in "JPEG"."""

    def __check_init__(self) -> None:
        if (of_test := self.test.inputs.shape[1:]) != self.shape:
            raise ValueError(f"inputs of test must be of shape {self.shape}, got {of_test}")

    def normalize(self, inputs: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """Raw inputs of shape [..., *shape] as the model sees them: (inputs - offset) scale."""
        return (inputs.astype(jnp.float32) - self.offset) * self.scale

    def checksum(self) -> str:
        """SHA-256 of both splits and of how they are scaled."""
        arrays = {
            f"{name} {part}": np.asarray(getattr(getattr(self, name), part))
            for name in ("train", "test")
            for part in ("inputs", "labels")
        }
        arrays |= {"offset": np.asarray(self.offset), "scale": np.asarray(self.scale)}
        return checksums.of_arrays(arrays, {"classes": str(self.classes)})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input: (height, width, channels) or (coordinates,)."""
        return self.train.inputs.shape[1:]


PIXEL_SCALINGS = ("unit", "standardized", "symmetric")
POINT_SCALINGS = ("none", "standardized")


def make_dataset(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    scaling: str,
    largest: int,
    name: str,
    classes: int,
    note: str = "",
) -> Dataset:
    """A data set of (inputs, labels); ``largest`` is the largest value that a pixel can have."""
    of = {"none": (0.0, 1.0), "unit": (0.0, 1 / largest), "symmetric": (largest / 2, 2 / largest)}
    offset, scale = of.get(scaling) or _standardization(train[0])
    return Dataset(
        Split(train[0], jnp.asarray(train[1], jnp.int32)),
        Split(test[0], jnp.asarray(test[1], jnp.int32)),
        offset,
        scale,
        name=name,
        classes=classes,
        note=note,
    )


def _standardization(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and one over the deviation, along the last axis: float64 [C]."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    mean = flat.mean(axis=0, dtype=np.float64)
    square = np.einsum("nc,nc->c", flat, flat, dtype=np.float64) / len(flat)
    variance = square - mean**2
    if (variance <= 1e-9 * square).any():  # nothing, or what rounding has left
        raise ValueError('inputs must differ in each channel or coordinate to be "standardized"')
    return mean, 1 / np.sqrt(variance)
