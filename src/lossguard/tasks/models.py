"""The optimizees: their hyperparameters, their initialization, their forward pass.

A model is a frozen dataclass of plain values. ``init`` makes its parameters, a tuple of Equinox
layers, and ``apply`` maps a batch of inputs to outputs. Its docstring is also its help on the
command line. The paper's models, ``MLP`` and ``ConvNet``, begin as Equinox begins and as PyTorch
does: uniform within 1 / sqrt(fan-in).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..validation import check_count, check_kind, freeze_lists

MOST_UNITS = 10**6
"""Of a layer: XLA ends the process over arrays whose size it can't count."""


class Model(Protocol):
    """What a task needs of a model: parameters from a key, outputs from parameters and inputs."""

    def init(self, shape: Sequence[int], classes: int, key: PRNGKeyArray) -> PyTree: ...

    def apply(
        self, params: PyTree, inputs: Float[Array, "batch ..."]
    ) -> Float[Array, "batch classes"]: ...


class FullyConnected:
    """What both kinds of fully connected layers do with their parameters."""

    activation: ClassVar[Callable[[Array], Array]]
    """Between two layers."""

    def apply(
        self, params: tuple[eqx.nn.Linear, ...], inputs: Float[Array, "batch ..."]
    ) -> Float[Array, "batch classes"]:
        """The outputs of a batch.

        >>> model = MLP(hidden=(20,))
        >>> params = model.init((28, 28, 1), 10, jax.random.key(0))
        >>> model.apply(params, jnp.zeros((128, 28, 28, 1))).shape
        (128, 10)
        """
        x = inputs.reshape(inputs.shape[0], -1)
        for layer in params[:-1]:
            x = type(self).activation(jax.vmap(layer)(x))
        return jax.vmap(params[-1])(x)


@dataclass(frozen=True)
class MLP(FullyConnected):
    """Fully connected layers with sigmoids between them (paper, section 4)."""

    hidden: tuple[int, ...] = (20,)
    """Units of each hidden layer."""
    activation = staticmethod(jax.nn.sigmoid)

    __post_init__ = freeze_lists

    def init(
        self, shape: Sequence[int], classes: int, key: PRNGKeyArray
    ) -> tuple[eqx.nn.Linear, ...]:
        _check_counts(hidden=self.hidden)
        sizes = (int(np.prod(shape)), *self.hidden, classes)
        keys = jax.random.split(key, len(sizes) - 1)
        return tuple(
            eqx.nn.Linear(m, n, key=k) for (m, n), k in zip(pairwise(sizes), keys, strict=True)
        )


@dataclass(frozen=True)
class ReluMLP(FullyConnected):
    """Fully connected layers with ReLUs between them, which begin as Haiku's do.

    Weights are normal of deviation 1 / sqrt(fan-in), drawn again beyond two deviations; biases are
    zero.
    """

    hidden: tuple[int, ...] = (128, 128)
    """Units of each hidden layer."""
    activation = staticmethod(jax.nn.relu)

    __post_init__ = freeze_lists

    def init(
        self, shape: Sequence[int], classes: int, key: PRNGKeyArray
    ) -> tuple[eqx.nn.Linear, ...]:
        params = MLP(self.hidden).init(shape, classes, key)
        keys = jax.random.split(key, len(params))
        return tuple(_as_haiku(layer, k) for layer, k in zip(params, keys, strict=True))


def _as_haiku(layer: eqx.nn.Linear, key: PRNGKeyArray) -> eqx.nn.Linear:
    """A layer of the same sizes, drawn as Haiku draws it."""
    assert layer.bias is not None
    normal = jax.random.truncated_normal(key, -2, 2, layer.weight.shape)
    drawn = normal / layer.weight.shape[1] ** 0.5, jnp.zeros_like(layer.bias)
    return eqx.tree_at(lambda it: (it.weight, it.bias), layer, drawn)


@dataclass(frozen=True)
class ConvNet:
    """Convolutions without padding, each followed by a ReLU, and a linear head (paper, section 4).

    The defaults are the paper's three-layer net; its five-layer one is
    ``ConvNet((8, 16, 32, 32, 64), (3, 3, 3, 3, 1), (2, 2, 2, 1, 1))``.
    """

    channels: tuple[int, ...] = (8, 16, 32)
    kernels: tuple[int, ...] = (5, 3, 3)
    strides: tuple[int, ...] = (2, 2, 2)

    __post_init__ = freeze_lists

    def init(
        self, shape: Sequence[int], classes: int, key: PRNGKeyArray
    ) -> tuple[eqx.nn.Conv2d | eqx.nn.Linear, ...]:
        if len(shape) != 3:
            raise ValueError(f"inputs of a ConvNet must be [height, width, channels], got {shape}")
        if not len(self.channels) == len(self.kernels) == len(self.strides):
            raise ValueError(f"channels, kernels and strides must be equally many, got {self}")
        _check_counts(channels=self.channels, kernels=self.kernels, strides=self.strides)
        height, width, channels = shape
        keys = jax.random.split(key, len(self.channels) + 1)
        layers: list[eqx.nn.Conv2d | eqx.nn.Linear] = []
        for out, kernel, stride, k in zip(
            self.channels, self.kernels, self.strides, keys[:-1], strict=True
        ):
            layers.append(eqx.nn.Conv2d(channels, out, kernel, stride, key=k))
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            channels = out
            if min(height, width) < 1:
                raise ValueError(f"inputs of shape {tuple(shape)} are too small for {self}")
        layers.append(eqx.nn.Linear(height * width * channels, classes, key=keys[-1]))
        return tuple(layers)

    def apply(
        self,
        params: tuple[eqx.nn.Conv2d | eqx.nn.Linear, ...],
        inputs: Float[Array, "batch height width channels"],
    ) -> Float[Array, "batch classes"]:
        """The logits of a batch.

        >>> model = ConvNet()
        >>> params = model.init((32, 32, 3), 10, jax.random.key(0))
        >>> model.apply(params, jnp.zeros((128, 32, 32, 3))).shape
        (128, 10)
        """
        x = inputs
        for layer in params[:-1]:
            assert isinstance(layer, eqx.nn.Conv2d) and layer.bias is not None
            x = jax.nn.relu(convolve(x, layer.weight, layer.stride[0]) + layer.bias[:, 0, 0])
        return jax.vmap(params[-1])(x.reshape(x.shape[0], -1))


def _check_counts(**counts: tuple[int, ...]) -> None:
    for name, values in counts.items():
        check_kind(name, values, tuple, "(20,)")
        for value in values:
            check_count(f"each of {name}", value, most=MOST_UNITS)


def convolve(
    x: Float[Array, "batch height width inputs"],
    weight: Float[Array, "outputs inputs kernel kernel"],
    stride: int,
) -> Float[Array, "batch height2 width2 outputs"]:
    """A convolution without padding.

    On a CPU it is one matrix product over patches, since XLA's own convolution is 10 to 30 times
    slower there inside a compiled loop.
    """
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=lambda x, w: convolve_patches(x, w, stride),
        default=lambda x, w: convolve_lax(x, w, stride),
    )


def convolve_lax(x: Array, weight: Array, stride: int) -> Array:
    """The convolution that XLA has."""
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), "VALID", dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


def convolve_patches(x: Array, weight: Array, stride: int) -> Array:
    """The same as one matrix product, over patches made of strided slices.

    The slices are joined along the width and then along the height: 2 kernel slices instead of
    kernel^2, and as many fewer additions in the gradient.
    """
    outputs, inputs, kernel, _ = weight.shape
    patches = x
    for axis in (2, 1):
        size = (x.shape[axis] - kernel) // stride + 1
        slices = [
            jax.lax.slice_in_dim(patches, k, k + stride * (size - 1) + 1, stride, axis)
            for k in range(kernel)
        ]
        patches = jnp.concatenate(slices, axis=-1)
    matrix = weight.transpose(2, 3, 1, 0).reshape(kernel * kernel * inputs, outputs)
    return patches @ matrix
