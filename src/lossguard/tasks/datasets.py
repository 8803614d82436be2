"""The data sets by name."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ..validation import check_choice
from .dataset import Dataset
from .images import cifar10, digits, fashion_mnist, mnist, tiny_imagenet50_32px
from .points import circles, moons, spirals, two_spirals

POINTS = spirals, two_spirals, circles, moons
IMAGES = digits, mnist, fashion_mnist, cifar10, tiny_imagenet50_32px
DATASETS: Mapping[str, Callable[..., Dataset]] = MappingProxyType(
    {loader.__name__: loader for loader in POINTS + IMAGES}
)


def load_dataset(name: str, **options: Any) -> Dataset:
    """A data set by its name.

    Args:
        name: one of ``DATASETS``.
        options: its loader's arguments.

    Raises:
        ValueError: if there is none of that name, or it has no such option.

    >>> load_dataset("spirals", samples=100).name
    'spirals'
    >>> load_dataset("spiral")
    Traceback (most recent call last):
    ValueError: data set must be one of spirals, ..., got 'spiral' (did you mean spirals?)
    """
    check_choice("data set", name, DATASETS)
    loader = DATASETS[name]
    known = inspect.signature(loader).parameters
    for option in options:
        check_choice(f"an option of {name}", option, known)
    return loader(**options)
