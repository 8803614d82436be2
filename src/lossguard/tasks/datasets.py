"""The data sets by name."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from .dataset import Dataset, Split
from .images import cifar10, digits, fashion_mnist, mnist, tiny_imagenet, tiny_imagenet50_32px
from .points import circles, moons, spirals

__all__ = [
    "DATASETS",
    "Dataset",
    "Split",
    "cifar10",
    "circles",
    "digits",
    "fashion_mnist",
    "load_dataset",
    "mnist",
    "moons",
    "spirals",
    "tiny_imagenet",
    "tiny_imagenet50_32px",
]

DATASETS: Mapping[str, Callable[..., Dataset]] = MappingProxyType(
    {
        "spirals": spirals,
        "circles": circles,
        "moons": moons,
        "digits": digits,
        "mnist": mnist,
        "fashion_mnist": fashion_mnist,
        "cifar10": cifar10,
        "tiny_imagenet": tiny_imagenet,
        "tiny_imagenet50_32px": tiny_imagenet50_32px,
    }
)


def load_dataset(name: str, **options: Any) -> Dataset:
    """The data set `name`, one of `DATASETS`; `options` are its loader's arguments.

    Raises `ValueError` for a name or an option that doesn't exist, with the near matches.

    >>> load_dataset("spirals", samples=100).name
    'spirals'
    >>> load_dataset("spiral")
    Traceback (most recent call last):
    ValueError: name must be one of spirals, ..., but is 'spiral' (did you mean 'spirals'?).
    """
    if name not in DATASETS:
        raise ValueError(_unknown("name", name, DATASETS))
    loader = DATASETS[name]
    known = inspect.signature(loader).parameters
    for option in options:
        if option not in known:
            raise ValueError(_unknown(f"an option of {name}", option, known))
    return loader(**options)


def _unknown(argument: str, given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, known)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return f"{argument} must be one of {', '.join(known)}, but is {given!r}{hint}."
