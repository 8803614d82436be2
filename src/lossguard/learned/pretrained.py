"""Learned optimizers on disk, and those shipped, ready to use in optax."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save

from ..runs import checksums
from ..runs.files import write_whole
from ..validation import check_kind, check_network
from .lstm import LSTMWeights, init_lstm_weights, lstm_optimizer
from .mlp import MLPWeights, init_mlp_weights, mlp_optimizer
from .weights_file import ARCHITECTURES, path_of, read_weights

LearnedWeights = LSTMWeights | MLPWeights


IN_JAX: dict[str, tuple[Callable[..., Any], Callable[..., optax.GradientTransformation]]] = {
    "lstm": (init_lstm_weights, lstm_optimizer),
    "mlp": (init_mlp_weights, mlp_optimizer),
}
"""What makes an architecture's weights, and its optimizer."""


class LearnedOptimizer(NamedTuple):
    """What a file of weights holds: all that it takes to use them, and where they come from."""

    weights: LearnedWeights
    numbers: dict[str, float]
    """Arguments of the optimizer that the weights were trained with: p and scale of an LSTM."""
    made: dict[str, str]
    """How they were made: command, commit, seed and the like."""

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer, ready to use."""
        _, optimizer = IN_JAX[_sizes(self.weights)[0]]
        return optimizer(self.weights, **self.numbers)


def pretrained(name: str | os.PathLike[str]) -> optax.GradientTransformation:
    """A learned optimizer that the package ships, or one of your own, ready to use in optax.

    ``load_weights(pretrained_path(name))`` gives its weights and how they were made.

    Args:
        name: one of ``pretrained_names()``, or the path of what meta-training left, which ends in
            ``.safetensors``.

    Raises:
        ValueError: if there is none of that name, or the file is damaged.

    >>> optimizer, w = pretrained("mlp-small"), jnp.zeros(3)
    >>> update, state = optimizer.update(jnp.ones(3), optimizer.init(w), w)
    >>> bool((update < 0).all())
    True
    """
    return load_weights(path_of(name)).transformation()


def load_weights(path: str | os.PathLike[str]) -> LearnedOptimizer:
    """Read what ``save_weights`` or meta-training wrote.

    Raises:
        ValueError, OSError: as ``read_weights`` in ``weights_file.py``, which describes such files.
    """
    file = read_weights(path)
    init, _ = IN_JAX[file.architecture]
    sized = partial(init, hidden=file.hidden, layers=file.layers)
    like = jax.eval_shape(sized, jax.random.key(0))
    names = ARCHITECTURES[file.architecture].shapes(file.hidden, file.layers)
    leaves = [jnp.asarray(file.tensors[name]) for name in names]
    weights = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return LearnedOptimizer(weights, file.numbers, file.made)


def save_weights(
    path: str | os.PathLike[str], weights: LearnedWeights, *, made: dict[str, str], **numbers: float
) -> None:
    """Write weights with everything that makes them usable; a file of that name is replaced.

    The file appears whole or not at all, with a checksum that ``load_weights`` verifies.

    Args:
        path: where to, usually ``<name>.safetensors``.
        weights: of ``lstm_optimizer`` or ``mlp_optimizer``.
        made: how they were made, for those who use them. Names and values are strings.
        numbers: p and scale of ``lstm_optimizer``; none for ``mlp_optimizer``.

    Raises:
        ValueError: if a weight or a number is not finite, layers differ in size, the numbers are
            not the architecture's, or ``made`` has a name that is taken.
        OSError: if the file can't be written.

    >>> import tempfile
    >>> weights = init_mlp_weights(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(f"{folder}/mine.safetensors", weights, made={"seed": "0"})
    ...     loaded = load_weights(f"{folder}/mine.safetensors")
    >>> loaded.numbers, loaded.made
    ({}, {'seed': '0'})
    >>> optimizer = loaded.transformation()
    """
    path = Path(path)
    name, hidden, layers = _sizes(weights)
    check_network(hidden, layers)
    architecture = ARCHITECTURES[name]
    if numbers.keys() != set(architecture.numbers):
        needed, given = (", ".join(names) or "none" for names in (architecture.numbers, numbers))
        raise ValueError(f"numbers of {type(weights).__name__} must be {needed}, got {given}")
    architecture.check(**numbers)
    if any(map(np.iscomplexobj, jax.tree.leaves(weights))):
        raise ValueError("weights must be real, got complex ones")
    shapes = architecture.shapes(hidden, layers)
    tensors: dict[str, np.ndarray] = {}
    for tensor_name, leaf in zip(shapes, jax.tree.leaves(weights), strict=True):
        tensors[tensor_name] = tensor = np.ascontiguousarray(leaf, np.float32)
        if list(tensor.shape) != (right := list(shapes[tensor_name])):
            raise ValueError(
                f"weights must have {tensor_name} of shape {right}, as its first layer has "
                f"{hidden} units, got {list(tensor.shape)}"
            )
        if not np.isfinite(tensor).all():
            raise ValueError(f"weights must be finite, but {tensor_name} is not")
    about = {"architecture": name, "hidden": str(hidden), "layers": str(layers)}
    about |= {number: repr(float(numbers[number])) for number in architecture.numbers}
    taken = (*about, checksums.NAME)
    for key, value in made.items():
        if key in taken or not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(
                f"made must map strings other than {', '.join(taken)} to strings, "
                f"got {key!r}: {value!r}"
            )
    about |= made
    about[checksums.NAME] = checksums.of_arrays(tensors, about)
    write_whole(path, save(tensors, about), "the weights")


def _sizes(weights: LearnedWeights) -> tuple[str, int, int]:
    """Architecture, hidden units and layers."""
    if isinstance(weights, MLPWeights):
        return "mlp", len(weights.layers[0].bias), len(weights.layers) - 1
    check_kind("weights", weights, LSTMWeights, "init_lstm_weights(key)")
    return "lstm", weights.linear_weight.shape[1], len(weights.layers)
