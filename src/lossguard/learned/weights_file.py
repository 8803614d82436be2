"""Files of weights: what both frameworks read, and those that the package ships.

Tensors are in float32, with the names and shapes of PyTorch modules; H hidden units, K layers.

An LSTM optimizer, ``lstm`` a ``torch.nn.LSTM`` and ``linear`` a ``torch.nn.Linear``:

    lstm.weight_ih_l0 [4H, 2]   lstm.weight_hh_l0 [4H, H]   lstm.bias_ih_l0, lstm.bias_hh_l0 [4H]
    the same as far as l{K-1}, with weight_ih [4H, H]       linear.weight [1, H], linear.bias [1]

An MLP optimizer, ``mlp`` a list of K + 1 ``torch.nn.Linear``; a decay d is log(1 - d) / 10:

    mlp.0.weight [H, 39], mlp.0.bias [H]   as far as mlp.{K-1} with [H, H]   mlp.{K} [2, H] and [2]
    momentum_decays [3]   second_moment_decay [1]   factored_decays [3]   scaling [7]
    scheduler.input [8, 15]   scheduler.hidden [8, 8]   scheduler.bias [8]   scheduler.output [8]

Metadata, all strings: ``architecture``, "lstm" or "mlp", ``hidden`` = H, ``layers`` = K, of an LSTM
``p`` and ``scale``, ``sha256``, the checksum of all that is in the file, and how the weights were
made, under whatever names. A file that another program wrote may lack the checksum. Nothing here
imports JAX or PyTorch.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ..runs import checksums
from ..validation import check_choice, check_kind, check_lstm, check_network
from .mlp_features import (
    FACTORED_DECAYS,
    FEATURES,
    MOMENTUM_DECAYS,
    OUTPUTS,
    SCALING,
    SIGNALS,
    TIMES,
    UNITS,
)

SUFFIX = ".safetensors"
SHIPPED = Path(__file__).parent / "weights"
NEEDED = ("architecture", "hidden", "layers")


class Architecture(NamedTuple):
    """What the files of one architecture have beside ``NEEDED``."""

    numbers: tuple[str, ...]
    """Further metadata, numbers: arguments of the optimizer."""
    check: Callable[..., None]
    """Refuses numbers out of range."""
    shapes: Callable[[int, int], dict[str, list[int]]]
    """The tensors by hidden units and layers, in the order of the weights' leaves in JAX."""


class WeightsFile(NamedTuple):
    """What a file holds."""

    architecture: str
    hidden: int
    layers: int
    numbers: dict[str, float]
    tensors: dict[str, np.ndarray]
    made: dict[str, str]


def pretrained_names() -> list[str]:
    """The learned optimizers that the package ships.

    >>> pretrained_names()
    ['lstm-cifar10-conv', 'lstm-mnist-mlp', 'lstm-mnist-mlp-paper', 'mlp-small']
    """
    return sorted(path.stem for path in SHIPPED.glob(f"*{SUFFIX}"))


def pretrained_path(name: str) -> Path:
    """The file of a learned optimizer that the package ships.

    Raises:
        ValueError: if there is none of that name.
    """
    check_choice("learned optimizer", name, (*pretrained_names(), f"a path that ends in {SUFFIX}"))
    return SHIPPED / (name + SUFFIX)


def path_of(name: str | os.PathLike[str]) -> Path:
    """The file of one of ``pretrained_names()``, or the path of another that ends in ``SUFFIX``."""
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    check_kind("learned optimizer", name, str, "'mlp-small'")
    return Path(name) if name.endswith(SUFFIX) else pretrained_path(name)


_NOTED: ContextVar[dict[str, str] | None] = ContextVar("noted", default=None)


@contextmanager
def noting_weights() -> Iterator[dict[str, str]]:
    """Inside, checksums of all weights and numbers that are read are noted, by their files' names.

    As manifests have checksums: by what they are of, several of one name in a row.

    >>> with noting_weights() as noted:
    ...     _ = read_weights(pretrained_path("mlp-small"))
    >>> {name: len(sums) for name, sums in noted.items()}
    {'the file mlp-small.safetensors': 64}
    """
    noted: dict[str, str] = {}
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def read_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """Read a file, and check that it is what this module describes.

    The checksum is verified, if the file has one.

    Raises:
        ValueError: if the file is damaged, is not what this module describes, or holds a weight
            that is not finite.
        OSError: if it can't be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, but there is none at {path}")
    try:
        with safe_open(path, framework="np") as file:
            about = dict(file.metadata() or {})
            name, hidden, layers, numbers = _read_metadata(about)
            _check_tensors(file, name, hidden, layers)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.pop(checksums.NAME, None) not in (None, checksums.of_arrays(tensors, about)):
            raise ValueError("its content is not that of its SHA-256")
        for tensor_name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise ValueError(f"its tensor {tensor_name} is not finite")
    except (SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"weights must be a complete {SUFFIX} file of a learned optimizer, "
            f"but {path} is not: {reason}"
        ) from error
    if (noted := _NOTED.get()) is not None:
        used = {key: repr(number) for key, number in numbers.items()}
        what = f"the file {path.name}"
        sums = {*noted.get(what, "").split(), checksums.of_arrays(tensors, used)}
        noted[what] = " ".join(sorted(sums))
    made = {key: value for key, value in about.items() if key not in (*NEEDED, *numbers)}
    return WeightsFile(name, hidden, layers, numbers, tensors, made)


def lstm_names(layer: int) -> list[str]:
    """The tensors of one layer, as ``torch.nn.LSTM`` calls them."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [f"lstm.{kind}_l{layer}" for kind in kinds]


def mlp_names(layer: int) -> list[str]:
    """The tensors of one layer of an MLP."""
    return [f"mlp.{layer}.weight", f"mlp.{layer}.bias"]


def _read_metadata(about: dict[str, str]) -> tuple[str, int, int, dict[str, float]]:
    """Architecture, hidden, layers and numbers."""
    name = _require(about, NEEDED)[0]
    check_choice("its architecture", name, ARCHITECTURES)
    numbers = ARCHITECTURES[name].numbers
    values = dict(zip(numbers, map(float, _require(about, numbers)), strict=True))
    hidden, layers = int(about["hidden"]), int(about["layers"])
    check_network(hidden, layers)
    ARCHITECTURES[name].check(**values)
    return name, hidden, layers, values


def _require(about: dict[str, str], names: tuple[str, ...]) -> list[str]:
    missing = [name for name in names if name not in about]
    if missing:
        raise ValueError(f"its metadata lack {', '.join(missing)}")
    return [about[name] for name in names]


def _check_tensors(file: Any, architecture: str, hidden: int, layers: int) -> None:
    """Whether names, shapes and types are those of the metadata, before anything is read."""
    names = set(file.keys())
    shapes = ARCHITECTURES[architecture].shapes(hidden, min(layers, len(names)))
    if missing := sorted(shapes.keys() - names):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := sorted(names - shapes.keys()):
        raise ValueError(
            f"it holds {', '.join(unknown)}, which no {architecture} of {layers} layers has"
        )
    for name, shape in shapes.items():
        view = file.get_slice(name)
        if view.get_shape() != shape or view.get_dtype() != "F32":
            raise ValueError(
                f"its tensor {name} must be F32 {shape}, got {view.get_dtype()} {view.get_shape()}"
            )


def _lstm_shapes(hidden: int, layers: int) -> dict[str, list[int]]:
    shapes = {}
    for k in range(layers):
        inputs = hidden if k else 2
        of_layer = ([4 * hidden, inputs], [4 * hidden, hidden], [4 * hidden], [4 * hidden])
        shapes.update(zip(lstm_names(k), of_layer, strict=True))
    return {**shapes, "linear.weight": [1, hidden], "linear.bias": [1]}


def _mlp_shapes(hidden: int, layers: int) -> dict[str, list[int]]:
    sizes = [FEATURES + len(TIMES), *[hidden] * layers, OUTPUTS]
    shapes = {}
    for k, (inputs, outputs) in enumerate(pairwise(sizes)):
        shapes.update(zip(mlp_names(k), ([outputs, inputs], [outputs]), strict=True))
    return {
        **shapes,
        "momentum_decays": [len(MOMENTUM_DECAYS)],
        "second_moment_decay": [1],
        "factored_decays": [len(FACTORED_DECAYS)],
        "scaling": [SCALING],
        "scheduler.input": [UNITS, SIGNALS],
        "scheduler.hidden": [UNITS, UNITS],
        "scheduler.bias": [UNITS],
        "scheduler.output": [UNITS],
    }


ARCHITECTURES = {
    "lstm": Architecture(("p", "scale"), check_lstm, _lstm_shapes),
    "mlp": Architecture((), lambda: None, _mlp_shapes),
}
