"""The records that a command leaves, as several tests here want them."""

from pathlib import Path

import numpy as np

from lossguard import records


def same_curves(folder: Path, expected: Path) -> None:
    """Two runs have the same curves and evaluations, bit by bit."""
    for name in (records.CURVES, records.EVALUATIONS):
        found, right = (records.read_parquet(f / name) for f in (folder, expected))
        assert found.schema == right.schema
        for column in right.columns:
            np.testing.assert_array_equal(found[column], right[column])  # NaN equals NaN
