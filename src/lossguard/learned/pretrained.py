"""Learned optimizers on disk: safetensors files that PyTorch reads as well, and those shipped.

Tensors have the names and shapes of a PyTorch module whose attributes ``lstm`` and ``linear`` are
``torch.nn.LSTM`` and ``torch.nn.Linear``, in float32; H hidden cells, K layers:

    lstm.weight_ih_l0 [4H, 2]   lstm.weight_hh_l0 [4H, H]   lstm.bias_ih_l0, lstm.bias_hh_l0 [4H]
    the same as far as l{K-1}, with weight_ih [4H, H]       linear.weight [1, H], linear.bias [1]

Metadata, all strings: ``architecture`` = "lstm", ``hidden`` = H, ``layers`` = K, ``p``, ``scale``,
and how the weights were made, under whatever names.
"""

import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..files import write_whole
from ..validation import check_positive, one_of
from .lstm import LSTMLayer, LSTMWeights, lstm_optimizer

SUFFIX = ".safetensors"
NEEDED = ("architecture", "hidden", "layers", "p", "scale")


class LearnedOptimizer(NamedTuple):
    """What a file of weights holds: all that it takes to use them, and where they come from."""

    weights: LSTMWeights
    p: float
    """Scale of the input logarithm that the weights were trained with."""
    scale: float
    """Factor of the output that they were trained with."""
    made: dict[str, str]
    """How they were made: command, commit, seed and the like."""

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer, ready to use."""
        return lstm_optimizer(self.weights, scale=self.scale, p=self.p)


def pretrained(name: str) -> optax.GradientTransformation:
    """A learned optimizer that the package ships, or one of your own, ready to use in optax.

    ``load_weights(pretrained_path(name))`` gives its weights and how they were made.

    Args:
        name: one of ``pretrained_names()``, or the path of what meta-training left, which ends in
            ``.safetensors``.

    Raises:
        ValueError: if there is none of that name, or the file is damaged.

    >>> optimizer = pretrained("lstm-mnist-mlp")
    >>> update, state = optimizer.update(jnp.ones(3), optimizer.init(jnp.zeros(3)))
    >>> bool((update < 0).all())
    True
    """
    path = name if name.endswith(SUFFIX) else pretrained_path(name)
    return load_weights(path).transformation()


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


def load_weights(path: str | os.PathLike[str]) -> LearnedOptimizer:
    """Read what ``save_weights`` or meta-training wrote.

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
    return LearnedOptimizer(_as_weights(tensors, layers), p, scale, made)


def save_weights(
    path: str | os.PathLike[str],
    weights: LSTMWeights,
    *,
    p: float,
    scale: float,
    made: dict[str, str],
) -> None:
    """Write weights with everything that makes them usable; a file of that name is replaced.

    The file appears whole or not at all.

    Args:
        path: where to, usually ``<name>.safetensors``.
        weights: of ``lstm_optimizer``, likewise p and scale.
        p: scale of the input logarithm.
        scale: factor of the output.
        made: how they were made, for those who use them. Names and values are strings.

    Raises:
        ValueError: if a weight, p or scale is not finite, or ``made`` has a name that is taken.
        OSError: if the file can't be written.

    >>> import jax, tempfile
    >>> from lossguard.learned.lstm import init_lstm_weights
    >>> weights = init_lstm_weights(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(f"{folder}/mine.safetensors", weights, p=10, scale=0.1, made={"seed": "0"})
    ...     loaded = load_weights(f"{folder}/mine.safetensors")
    >>> loaded.scale, loaded.made
    (0.1, {'seed': '0'})
    >>> optimizer = loaded.transformation()
    """
    path = Path(path)
    tensors = _as_tensors(weights)
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"weights must be finite, but {name} is not")
    check_positive(p=p, scale=scale)
    for name, value in made.items():
        if name in NEEDED or not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(
                f"made must map strings other than {', '.join(NEEDED)} to strings, "
                f"got {name!r}: {value!r}"
            )
    about = {
        "architecture": "lstm",
        "hidden": str(weights.linear_weight.shape[1]),
        "layers": str(len(weights.layers)),
        "p": repr(float(p)),
        "scale": repr(float(scale)),
    }
    write_whole(path, save(tensors, {**about, **made}), "the weights")


def _folder() -> Path:
    """Where the package keeps the files it ships."""
    folder = resources.files("lossguard") / "learned" / "weights"
    assert isinstance(folder, Path)  # the package is never imported from an archive
    return folder


def _layer_names(layer: int) -> list[str]:
    """The tensors of one layer as ``torch.nn.LSTM`` calls them, in the order of ``LSTMLayer``."""
    return [f"lstm.{field}_l{layer}" for field in LSTMLayer._fields]


def _as_tensors(weights: LSTMWeights) -> dict[str, np.ndarray]:
    named: dict[str, Any] = {
        "linear.weight": weights.linear_weight,
        "linear.bias": weights.linear_bias,
    }
    for k, layer in enumerate(weights.layers):
        named.update(zip(_layer_names(k), layer, strict=True))
    return {name: np.ascontiguousarray(array, np.float32) for name, array in named.items()}


def _as_weights(tensors: dict[str, np.ndarray], layers: int) -> LSTMWeights:
    arrays = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    return LSTMWeights(
        tuple(LSTMLayer(*(arrays[name] for name in _layer_names(k))) for k in range(layers)),
        arrays["linear.weight"],
        arrays["linear.bias"],
    )


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
        shapes.update(zip(_layer_names(k), of_layer, strict=True))
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
