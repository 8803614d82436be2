"""The config of a run as its records have it: plain JSON."""

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import jax
import numpy as np


def as_config(run: Any) -> dict[str, Any]:
    """The fields of a dataclass; a function by its module and name, and what it is given already.

    Raises:
        ValueError: if it holds something else than numbers, strings, paths, arrays, lists,
            mappings, functions and dataclasses of them.
    """
    return {f.name: _plain(getattr(run, f.name)) for f in fields(run)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {"kind": type(value).__name__} | as_config(value)
    if isinstance(value, Mapping):
        if strange := [k for k in value if not isinstance(k, str | int | float | None)]:
            raise ValueError(f"names in a mapping must be strings or numbers, got {strange[0]!r}")
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, partial):
        given = [repr(_plain(v)) for v in value.args]  # an address would be another one next time
        given += [f"{k}={_plain(v)!r}" for k, v in value.keywords.items()]
        return f"{_plain(value.func)}({', '.join(given)})"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return value.tolist()
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    if not isinstance(value, str | int | float | None):
        raise ValueError(
            "a run must be of numbers, strings, paths, arrays, lists, mappings, functions and "
            f"dataclasses of them, but holds {value!r}"
        )
    return value
