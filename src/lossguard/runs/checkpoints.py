"""Checkpoints of long computations: whole or not there, the last two kept, a damaged one told."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import PyTree
from safetensors import safe_open
from safetensors.numpy import save

from ..cli.terminal import tell
from . import checksums
from .files import write_whole

SUFFIX = ".safetensors"
KEPT = 2
LEAF, TABLE, STRUCTURE, NUMBER = "leaf", "table", "structure", "number"


class Checkpoints:
    """A folder of numbered checkpoints: a pytree of arrays, and tables, in a file each.

    A file holds the bytes of the leaves, the tables as Parquet, the structure of the pytree, its
    number, and a checksum of all this, which is verified.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, step: int, state: PyTree, *tables: pl.DataFrame) -> None:
        """Write checkpoint number ``step`` and drop the third last.

        Raises:
            OSError: if it can't be written, for example on a full disk; the others are left.
        """
        parts = {f"{LEAF} {k}": _bytes(leaf) for k, leaf in enumerate(jax.tree.leaves(state))}
        for k, table in enumerate(tables):
            table.write_parquet(buffer := io.BytesIO())
            parts[f"{TABLE} {k}"] = np.frombuffer(buffer.getbuffer(), np.uint8)
        about = {STRUCTURE: _structure(state), NUMBER: str(step)}
        about[checksums.NAME] = checksums.of_arrays(parts, about)
        write_whole(self._path(step), save(parts, about), "a checkpoint", make_folder=True)
        for old in self._steps()[KEPT:]:
            self._path(old).unlink()

    def latest(self, template: PyTree) -> tuple[int, PyTree, *tuple[pl.DataFrame, ...]] | None:
        """The newest checkpoint that is whole: its number, its pytree and its tables.

        ``template`` gives the structure, shapes and dtypes. None if there is no checkpoint. Those
        that can't be read are named on stderr and renamed: they are about to be written again.

        Raises:
            ValueError: if the newest one that is whole has another structure, shapes or dtypes.
            OSError: if one can't be read now, such as for want of file descriptors.
        """
        for step in self._steps():
            try:
                structure, parts = _read(self._path(step), step)
                fits = structure == _structure(template)
                found = _unpack(parts, template) if fits else ()
            except (OSError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # the file may be whole
            except (Exception, pl.exceptions.PanicException) as error:  # by a damaged file
                self._set_aside(step, error)
                continue
            if not fits:
                raise ValueError(
                    "checkpoint must have the structure, shapes and dtypes of what goes on from "
                    f"it, but {self._path(step)} has others: another version wrote it"
                )
            return step, *found
        return None

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}{SUFFIX}"

    def _steps(self) -> list[int]:
        """The numbers of those that are there, the newest first."""
        names = [path.name.removesuffix(SUFFIX) for path in self._folder.glob(f"*{SUFFIX}")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _set_aside(self, step: int, error: Exception) -> None:
        """Out of the way of the one that will be written again, but not lost."""
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        damaged = self._folder / f"{step}.damaged"
        self._path(step).replace(damaged)
        tell(f"checkpoint {step} is damaged and was passed over, it is now {damaged}: {reason}")


def _read(path: Path, step: int) -> tuple[str, dict[str, np.ndarray]]:
    """The structure and the parts of a checkpoint, whose number and checksum are right."""
    if not path.is_file():  # but a pipe, which has no end
        raise ValueError("it is not a file")
    with safe_open(path, framework="np") as file:
        about = dict(file.metadata())
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.pop(checksums.NAME) != checksums.of_arrays(parts, about):
        raise ValueError("its content is not that of its SHA-256")
    if (number := about.get(NUMBER, str(step))) != str(step):
        raise ValueError(f"it is number {number}")
    return about[STRUCTURE], parts


def _unpack(parts: dict[str, np.ndarray], template: PyTree) -> tuple[Any, ...]:
    """The pytree and the tables."""
    likes, tree = jax.tree.flatten(template)
    leaves = [_leaf(parts.pop(f"{LEAF} {k}"), like) for k, like in enumerate(likes)]
    tables = [pl.read_parquet(parts[name].tobytes()) for name in sorted(parts)]
    return tree.unflatten(leaves), *tables


def _structure(tree: PyTree) -> str:
    """The leaves' paths, dtypes and shapes."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return "\n".join(f"{jax.tree_util.keystr(at)} {x.dtype}{x.shape}" for at, x in leaves)


def _bytes(leaf: Any) -> np.ndarray:
    """The only way in which NumPy holds some of JAX's types."""
    numbers = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    return np.frombuffer(numbers.tobytes(), np.uint8)


def _leaf(part: np.ndarray, like: Any) -> Any:
    numbers = jax.random.key_data(like) if _is_key(like) else like
    found = part.view(numbers.dtype).reshape(numbers.shape)
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(like))
    return found if isinstance(like, np.ndarray) else jnp.asarray(found)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
