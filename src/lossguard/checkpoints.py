"""Checkpoints of long computations: atomic, the last two kept, a damaged one passed over aloud."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import PyTree
from rich.console import Console


class Checkpoints:
    """A folder of numbered checkpoints: a pytree of arrays, and a table, each.

    Written by Orbax, which renames a finished folder into its place, so that a kill at any moment
    leaves the last whole one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    @cached_property
    def _manager(self) -> Any:
        ocp = _orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, create=True, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: PyTree, table: pl.DataFrame) -> None:
        """Write checkpoint number ``step`` and drop the third last."""
        args = _orbax().args
        # Orbax sorts names; the numbers in front keep the order of the columns.
        columns = {f"{i:03} {name}": table[name].to_numpy() for i, name in enumerate(table.columns)}
        self._manager.save(
            step,
            args=args.Composite(state=args.StandardSave(state), table=args.StandardSave(columns)),
        )

    def latest(self, template: PyTree) -> tuple[int, PyTree, pl.DataFrame] | None:
        """The newest checkpoint that is whole: its number, its pytree and its table.

        ``template`` gives the structure, shapes and dtypes. None if there is no checkpoint; those
        that can't be read are named on stderr and deleted: they are about to be written anew.
        """
        if not self._folder.exists():
            return None
        args = _orbax().args
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._manager.restore(
                    step,
                    args=args.Composite(
                        state=args.StandardRestore(template), table=args.StandardRestore()
                    ),
                )
                columns = sorted(found["table"].items())
                table = pl.DataFrame({k.partition(" ")[2]: np.asarray(v) for k, v in columns})
            except Exception as error:  # whatever a damaged file makes the reader raise
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                Console(stderr=True).print(
                    f"checkpoint {step} is damaged and was passed over: {reason}", style="yellow"
                )
                self._manager.delete(step)
                continue
            return step, found["state"], table
        return None

    def delete(self) -> None:
        """Remove all of them, once the computation is done."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _orbax() -> Any:
    import orbax.checkpoint  # takes seconds to import, and short runs need none of it

    return orbax.checkpoint
