"""Checkpoints of long computations: atomic, the last two kept, a damaged one passed over aloud."""

import contextlib
import errno
import io
import logging
import re
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import PyTree

from . import checksums
from .terminal import PlainConsole


class Checkpoints:
    """A folder of numbered checkpoints: a pytree of arrays, and a table, each.

    Written by Orbax, which renames a finished folder into its place, so that a kill at any moment
    leaves the last whole one. Each holds a checksum of its numbers, which is verified.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    @cached_property
    def _manager(self) -> Any:
        ocp = _orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, create=True, enable_async_checkpointing=False
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("state", "table")}
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: PyTree, table: pl.DataFrame) -> None:
        """Write checkpoint number ``step`` and drop the third last.

        Raises:
            OSError: if it can't be written, for example on a full disk; the others are left.
        """
        args = _orbax().args
        # Orbax sorts names; the numbers in front keep the order of the columns.
        columns = {f"{i:03} {name}": table[name].to_numpy() for i, name in enumerate(table.columns)}
        written, _ = _split(state)
        columns[checksums.NAME] = _checksum(written, table)
        parts = args.Composite(state=args.StandardSave(written), table=args.StandardSave(columns))
        with _quietly():
            try:
                self._manager.save(step, args=parts)
            except Exception as error:  # of its threads, of C++, or an OSError without a path
                time.sleep(1)  # its threads print for a moment more
                number = getattr(error, "errno", None) or errno.EIO
                message = f"can't write a checkpoint: {_reason(error)}"
                raise OSError(number, message, str(self._folder)) from error

    def latest(self, template: PyTree) -> tuple[int, PyTree, pl.DataFrame] | None:
        """The newest checkpoint that is whole: its number, its pytree and its table.

        ``template`` gives the structure, shapes and dtypes. None if there is no checkpoint; those
        that can't be read are named on stderr and renamed: they are about to be written anew.

        Raises:
            ValueError: if the newest one that is whole has another structure or other shapes.
        """
        if not self._folder.exists():
            return None
        template, empty = _split(template)
        shapes = _shapes(template)
        with _quietly():
            steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                with _quietly():
                    fits = _shapes(self._manager.item_metadata(step)["state"].tree) == shapes
                    found = self._read(step, template) if fits else None
            except Exception as error:  # whatever a damaged file makes the reader raise
                self._set_aside(step, error)
                continue
            if found is None:
                raise ValueError(
                    "checkpoint must have the structure and shapes of what goes on from it, "
                    f"but {self._folder / str(step)} has others: another version wrote it"
                )
            state, table = found
            return step, eqx.combine(state, empty), table
        return None

    def _read(self, step: int, template: PyTree) -> tuple[PyTree, pl.DataFrame]:
        args = _orbax().args
        wanted = args.Composite(state=args.StandardRestore(template), table=args.StandardRestore())
        found = self._manager.restore(step, args=wanted)
        expected = np.asarray(found["table"].pop(checksums.NAME, ()))
        columns = sorted(found["table"].items())
        table = pl.DataFrame({k.partition(" ")[2]: np.asarray(v) for k, v in columns})
        if not np.array_equal(expected, _checksum(found["state"], table)):
            raise ValueError("its numbers are not those of its SHA-256")
        return found["state"], table

    def _set_aside(self, step: int, error: Exception) -> None:
        """Out of the way of the one that will be written anew, but not lost."""
        reason = _reason(error)[:200] or type(error).__name__
        damaged = self._folder / f"{step}.damaged"
        shutil.rmtree(damaged, ignore_errors=True)  # the same one, damaged once before
        (self._folder / str(step)).rename(damaged)
        with _quietly():
            self._manager.reload()
        PlainConsole(stderr=True).print(
            f"checkpoint {step} is damaged and was passed over, it is now {damaged}: {reason}",
            style="yellow",
            soft_wrap=True,
        )

    def delete(self) -> None:
        """Remove all of them, once the computation is done."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _orbax() -> Any:
    import orbax.checkpoint  # takes seconds to import, and short runs need none of it

    # Its threads log an error in hundreds of lines, some after it has been raised.
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    return orbax.checkpoint


def _split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The arrays of a tree that have elements, and the others, which Orbax refuses."""
    return eqx.partition(tree, lambda leaf: leaf.size > 0)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, or of what a leaf's metadata tell, by its path."""
    return {path: tuple(leaf.shape) for path, leaf in _leaves(tree).items()}


def _checksum(tree: PyTree, table: pl.DataFrame) -> np.ndarray:
    """Of all numbers, uint8 [32]."""
    numbers = {path: np.asarray(leaf) for path, leaf in _leaves(tree).items()}
    numbers |= {f"column {name}": table[name].to_numpy() for name in table.columns}
    return np.frombuffer(bytes.fromhex(checksums.of_arrays(numbers)), np.uint8)


def _leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths, as they are written."""

    def plain(leaf: Any) -> Any:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return _orbax().tree.to_flat_dict(jax.tree.map(plain, tree), sep="/")


def _reason(error: Exception) -> str:
    """On one line; of C++'s only what the system said: ``...: File too large [os_error_...``."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    said = re.search(r"([^:]*) \[os_error_code", text)
    return said[1].strip() if said else text


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _quietly() -> contextlib.AbstractContextManager[Any]:
    """For what its threads print of errors with Python, which is no logging."""
    return contextlib.redirect_stderr(io.StringIO())
