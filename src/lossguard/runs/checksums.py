"""SHA-256 of files and of what is in them: a bit that flipped changes no number in silence."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

NAME = "sha256"
"""Under which files and manifests hold a checksum."""


def of_file(path: Path) -> str:
    """Of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, NAME).hexdigest()


def of_json(content: Any) -> str:
    """Of what a JSON file holds, however it is laid out.

    >>> of_json({"a": 1, "b": (2.5,)}) == of_json({"b": [2.5], "a": 1}) != of_json({"a": 1})
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def of_arrays(arrays: Mapping[str, np.ndarray], about: Mapping[str, str] | None = None) -> str:
    """Of arrays, of numbers or of strings, with their names, types and shapes, in whatever order.

    Args:
        arrays: by their names.
        about: what belongs to them.
    """
    digest = hashlib.sha256(repr(sorted((about or {}).items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        is_text = array.dtype.kind in "OU"
        digest.update(repr(array.tolist()).encode() if is_text else array.tobytes())
    return digest.hexdigest()
