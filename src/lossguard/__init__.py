"""Use an optimizer that you don't trust, beside one that you do, at a bounded price.

The public names are those of ``__init__.pyi``, where type checkers read them too; each is imported
on first use, so that ``lossguard.torch`` works without JAX, and this without either.
"""

import importlib
from importlib import metadata, util
from typing import Any

import lazy_loader

from .extras import INSTALLS, needed
from .validation import nearest

IN_TORCH = ("BestOf", "Hedged", "LossGuard", "Recommended", "ResidualGuard", "Rewind")
"""Guards that are missed here."""
PARTS = ("experiments", "metatrain", "tasks", "torch")
"""Packages in this one."""
WITHOUT_JAX = (
    "decision_table",
    "plot_decisions",
    "plot_rewind",
    "pretrained_names",
    "pretrained_path",
    "scalars",
)
"""Public names that need none."""
_load, _names, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = metadata.version(__name__)


def __dir__() -> list[str]:
    """What can be had here: ``help`` and tools that complete names get all that is listed."""
    of_jax = INSTALLS["'lossguard[jax]'"]
    return _names() if all(map(util.find_spec, of_jax)) else [*WITHOUT_JAX]


def __getattr__(name: str) -> Any:
    if name in PARTS:
        with needed(f"lossguard.{name}"):
            return importlib.import_module(f"lossguard.{name}")
    if name not in __all__:
        hint = " (lossguard.torch has it)" if name in IN_TORCH else nearest(__all__, name)
        raise AttributeError(f"lossguard has no {name!r}{hint}", name=name)
    with needed(f"lossguard.{name}"):
        return _load(name)
