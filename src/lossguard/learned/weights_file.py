"""Files of weights: what both frameworks read, and those that the package ships.

Tensors have the names and shapes of a PyTorch module whose attributes ``lstm`` and ``linear`` are
``torch.nn.LSTM`` and ``torch.nn.Linear``, in float32; H hidden cells, K layers:

    lstm.weight_ih_l0 [4H, 2]   lstm.weight_hh_l0 [4H, H]   lstm.bias_ih_l0, lstm.bias_hh_l0 [4H]
    the same as far as l{K-1}, with weight_ih [4H, H]       linear.weight [1, H], linear.bias [1]

Metadata, all strings: ``architecture`` = "lstm", ``hidden`` = H, ``layers`` = K, ``p``, ``scale``,
``sha256``, the checksum of all that is in the file, and how the weights were made, under whatever
names. A file that another program wrote may lack the checksum. Nothing here imports JAX or PyTorch.
"""

import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from .. import checksums
from ..validation import check_positive, one_of

SUFFIX = ".safetensors"
NEEDED = ("architecture", "hidden", "layers", "p", "scale")


class WeightsFile(NamedTuple):
    """What a file holds."""

    tensors: dict[str, np.ndarray]
    layers: int
    p: float
    scale: float
    made: dict[str, str]


def pretrained_names() -> list[str]:
    """The learned optimizers that the package ships.

    >>> pretrained_names()
    ['lstm-cifar10-conv', 'lstm-mnist-mlp']
    """
    return sorted(
        entry.name.removesuffix(SUFFIX)
        for entry in _folder().iterdir()
        if entry.name.endswith(SUFFIX)
    )


def pretrained_path(name: str) -> Path:
    """The file of a learned optimizer that the package ships.

    Raises:
        ValueError: if there is none of that name.
    """
    names = pretrained_names()
    if name not in names:
        raise ValueError(f"learned optimizer must be {one_of(names, name)}")
    return _folder() / (name + SUFFIX)


def path_of(name: str | os.PathLike[str]) -> Path:
    """The file of one of ``pretrained_names()``, or the path of another that ends in ``SUFFIX``."""
    name = os.fspath(name)
    return Path(name) if name.endswith(SUFFIX) else pretrained_path(name)


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
            hidden, layers, p, scale = _read_metadata(about)
            _check_tensors(file, hidden, layers)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.pop(checksums.NAME, None) not in (None, checksums.of_arrays(tensors, about)):
            raise ValueError("its content is not that of its SHA-256")
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise ValueError(f"its tensor {name} is not finite")
    except (SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"weights must be a complete {SUFFIX} file of an LSTM optimizer, "
            f"but {path} is not: {reason}"
        ) from error
    made = {name: value for name, value in about.items() if name not in NEEDED}
    return WeightsFile(tensors, layers, p, scale, made)


def layer_names(layer: int) -> list[str]:
    """The tensors of one layer, as ``torch.nn.LSTM`` calls them."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [f"lstm.{kind}_l{layer}" for kind in kinds]


def _folder() -> Path:
    """Where the package keeps the files it ships."""
    folder = resources.files("lossguard") / "learned" / "weights"
    assert isinstance(folder, Path)  # the package is never imported from an archive
    return folder


def _read_metadata(about: dict[str, str]) -> tuple[int, int, float, float]:
    """hidden, layers, p and scale."""
    missing = [name for name in NEEDED if name not in about]
    if missing:
        raise ValueError(f"its metadata lack {', '.join(missing)}")
    if about["architecture"] != "lstm":
        raise ValueError(f"its architecture must be 'lstm', got {about['architecture']!r}")
    hidden, layers = int(about["hidden"]), int(about["layers"])
    p, scale = float(about["p"]), float(about["scale"])
    check_positive(hidden=hidden, layers=layers, p=p, scale=scale)
    return hidden, layers, p, scale


def _check_tensors(file: Any, hidden: int, layers: int) -> None:
    """Whether names, shapes and types are those of the metadata, before anything is read."""
    names = set(file.keys())
    shapes = {"linear.weight": [1, hidden], "linear.bias": [1]}
    for k in range(min(layers, len(names))):
        inputs = hidden if k else 2
        of_layer = ([4 * hidden, inputs], [4 * hidden, hidden], [4 * hidden], [4 * hidden])
        shapes.update(zip(layer_names(k), of_layer, strict=True))
    if missing := sorted(shapes.keys() - names):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := sorted(names - shapes.keys()):
        raise ValueError(f"it holds {', '.join(unknown)}, which an LSTM optimizer doesn't have")
    for name, shape in shapes.items():
        view = file.get_slice(name)
        if view.get_shape() != shape or view.get_dtype() != "F32":
            raise ValueError(
                f"its tensor {name} must be F32 {shape}, got {view.get_dtype()} {view.get_shape()}"
            )
