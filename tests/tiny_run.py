"""A run of two methods and one step: what its folder holds; and whether two hold the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lossguard.runs import folder as run_folder
from lossguard.runs import records
from lossguard.runs.curves import COUNTERS

TINY = str(Path(__file__).parent / "experiments" / "tiny.py")
RUN = ("run", f"{TINY}:recipe", "--out", "out")
"""The file of a small recipe, and a command that runs it."""
CONFIG = {
    "name": "mine",
    "title": "naïve",
    "methods": ("a", "b"),
    "seeds": 1,
    "seed": 0,
    "rate": 0.1,
}
TABLE = pl.DataFrame(
    {"method": ["a", "b"], "seed": [0, 0], "step": [1, 1], "loss": [1, 2], "used_learned": [1, 2]}
    | {name: [1, 2] for name in COUNTERS}
)
SECONDS = {"a": 1.5, "b": 2.5}
ABOUT = {
    "time": "2026-01-02T03:04:05Z",
    "command": ["lossguard", "run", "--methods", "LGL2O over Adam"],
    "commit": "0123abc",
    "python": "3.11.7",
    "versions": {"jax": "0.7"},
    "device": "cpu (2 cores)",
    "platform": "Linux",
}
"""What a manifest says of every run."""


def open_folder(folder: Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
    """As a run does that ends at once."""
    with run_folder.hold_folder(folder, config, resume=resume):
        pass


def leave(
    folder: Path,
    config: Mapping[str, Any] = CONFIG,
    curves: pl.DataFrame = TABLE,
    made: Mapping[str, Any] | None = None,
    evaluations: pl.DataFrame | None = None,
) -> Path:
    """Its records, or those of another run."""
    made = run_folder.manifest(seconds=SECONDS, data="") if made is None else ABOUT | {**made}
    open_folder(folder, config)
    records.write_parquet(folder / records.CURVES, curves)
    if evaluations is not None:
        records.write_parquet(folder / records.EVALUATIONS, evaluations)
    run_folder.finish(folder, made)
    return folder


def same_curves(folder: Path, expected: Path) -> None:
    """Two runs have the same curves and evaluations, bit by bit."""
    for name in (records.CURVES, records.EVALUATIONS):
        found, right = (records.read_parquet(f / name) for f in (folder, expected))
        assert found.schema == right.schema
        for column in right.columns:
            np.testing.assert_array_equal(found[column], right[column])  # NaN equals NaN
