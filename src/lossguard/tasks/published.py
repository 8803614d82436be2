"""Tasks of google/learned_optimization, by the names under which their baselines are published.

Images are divided by 255, models begin as Haiku's do, minibatches have 128 images. The training
split is 80 % of the data set's, as there: here its first 48,000 images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import equinox as eqx
import jax
import jax.numpy as jnp

from ..validation import check_choice, check_count
from .dataset import Dataset, Split
from .datasets import load_dataset
from .goals import CLASSIFICATION, RECONSTRUCTION, Goal
from .models import ReluMLP
from .task import Task

TRAINED_ON = 48_000
"""Images."""


@dataclass(frozen=True)
class Published:
    """What a published task is made of."""

    dataset: str
    """A name of ``DATASETS``."""
    model: ReluMLP
    size: int | None = None
    """Height and width to which images are resized, in pixels; None: as they are."""
    goal: Goal = CLASSIFICATION


_AUTOENCODER = ReluMLP((128, 32, 128))
PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "ImageMLP_FashionMnist_Relu128x128": Published("fashion_mnist", ReluMLP((128, 128))),
        "ImageMLP_Mnist_128x128x128_Relu": Published("mnist", ReluMLP((128, 128, 128))),
        "ImageMLP_FashionMnist8_Relu32": Published("fashion_mnist", ReluMLP((32,)), size=8),
        "ImageMLPAE_FashionMnist_128x32x128_bs128": Published(
            "fashion_mnist", _AUTOENCODER, goal=RECONSTRUCTION
        ),
        "ImageMLPAE_Mnist_128x32x128_bs128": Published("mnist", _AUTOENCODER, goal=RECONSTRUCTION),
    }
)


def published_task(name: str) -> Task:
    """A published task by its name.

    Args:
        name: one of ``PUBLISHED``.

    Raises:
        ValueError: if there is none of that name.
        ConnectionError: if its data is neither here nor to be had, as ``mnist`` raises it.

    >>> published_task("ImageMLP_Mnist")
    Traceback (most recent call last):
    ValueError: published task must be one of ImageMLP_FashionMnist_Relu128x128, ...
    """
    check_choice("published task", name, PUBLISHED)
    of = PUBLISHED[name]
    data = load_dataset(of.dataset, scaling="unit")
    train = Split(data.train.inputs[:TRAINED_ON], data.train.labels[:TRAINED_ON])
    data = eqx.tree_at(lambda it: it.train, data, train)
    data = data if of.size is None else resized(data, of.size)
    return Task(data, of.model, goal=of.goal)


def resized(data: Dataset, size: int) -> Dataset:
    """A data set with images of size x size pixels: bilinear, without smoothing before.

    Raises:
        ValueError: if size isn't an integer of at least 1, or it has no images.

    >>> from lossguard.tasks import digits
    >>> resized(digits(), 4).shape
    (4, 4, 1)
    """

    size = check_count("size", size)
    if len(data.shape) != 3:
        raise ValueError(f"what is resized must be images, got {data.name}")

    def one(images: jax.Array) -> jax.Array:
        shape = (len(images), size, size, images.shape[-1])
        return jax.image.resize(images.astype(jnp.float32), shape, "bilinear", antialias=False)

    return eqx.tree_at(lambda it: (it.train.inputs, it.test.inputs), data, replace_fn=one)
