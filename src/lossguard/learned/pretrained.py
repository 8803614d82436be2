"""Learned optimizers on disk, and those shipped, ready to use in optax."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save

from .. import checksums
from ..files import write_whole
from ..validation import check_positive
from .lstm import LSTMLayer, LSTMWeights, lstm_optimizer
from .weights_file import NEEDED, layer_names, path_of, read_weights

TAKEN = (*NEEDED, checksums.NAME)
"""Names of metadata that aren't free."""


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


def pretrained(name: str | os.PathLike[str]) -> optax.GradientTransformation:
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
    return load_weights(path_of(name)).transformation()


def load_weights(path: str | os.PathLike[str]) -> LearnedOptimizer:
    """Read what ``save_weights`` or meta-training wrote.

    Raises:
        ValueError, OSError: as ``read_weights`` in ``weights_file.py``, which describes such files.
    """
    tensors, layers, p, scale, made = read_weights(path)
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

    The file appears whole or not at all, with a checksum that ``load_weights`` verifies.

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
        if name in TAKEN or not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(
                f"made must map strings other than {', '.join(TAKEN)} to strings, "
                f"got {name!r}: {value!r}"
            )
    about = {
        "architecture": "lstm",
        "hidden": str(weights.linear_weight.shape[1]),
        "layers": str(len(weights.layers)),
        "p": repr(float(p)),
        "scale": repr(float(scale)),
    }
    about |= made
    about[checksums.NAME] = checksums.of_arrays(tensors, about)
    write_whole(path, save(tensors, about), "the weights")


def _as_tensors(weights: LSTMWeights) -> dict[str, np.ndarray]:
    named: dict[str, Any] = {
        "linear.weight": weights.linear_weight,
        "linear.bias": weights.linear_bias,
    }
    for k, layer in enumerate(weights.layers):
        named.update(zip(layer_names(k), layer, strict=True))
    return {name: np.ascontiguousarray(array, np.float32) for name, array in named.items()}


def _as_weights(tensors: dict[str, np.ndarray], layers: int) -> LSTMWeights:
    arrays = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    return LSTMWeights(
        tuple(LSTMLayer(*(arrays[name] for name in layer_names(k))) for k in range(layers)),
        arrays["linear.weight"],
        arrays["linear.bias"],
    )
