"""What a task asks of a model: how many outputs, and how they are scored, example by example."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from .dataset import Dataset

Scores = dict[str, Array]
"""By name, one number for each example; ``loss`` is what is minimized."""


class Goal(NamedTuple):
    """``CLASSIFICATION`` or ``RECONSTRUCTION``, or one of your own."""

    outputs: Callable[[Dataset], int]
    """How many a model must have for a data set."""
    scores: Callable[[Array, Array, Array], Scores]
    """Of outputs [batch, outputs], scaled inputs [batch, ...] and labels [batch]."""


def classify(
    outputs: Float[Array, "batch classes"],
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
) -> Scores:
    """Softmax, negative log-likelihood; and whether the likeliest class is the right one.

    >>> classify(jnp.zeros((2, 10)), jnp.zeros((2, 3)), jnp.array([0, 5]))["accuracy"].tolist()
    [1.0, 0.0]
    """
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return {"loss": losses, "accuracy": (jnp.argmax(outputs, axis=-1) == labels).astype(float)}


def reconstruct(
    outputs: Float[Array, "batch pixels"],
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
) -> Scores:
    """The mean of (sigmoid(output) - input)^2 over an image whose pixels are in [0, 1].

    >>> reconstruct(jnp.zeros((1, 4)), jnp.ones((1, 2, 2)), jnp.array([0]))["loss"].tolist()
    [0.25]
    """
    pixels = inputs.reshape(inputs.shape[0], -1)
    return {"loss": jnp.mean((jax.nn.sigmoid(outputs) - pixels) ** 2, axis=1)}


CLASSIFICATION = Goal(lambda data: data.classes, classify)
RECONSTRUCTION = Goal(lambda data: int(np.prod(data.shape)), reconstruct)
