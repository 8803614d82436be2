"""The command, and the records that it leaves, as several tests here want them."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossguard import cli, records


def command(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """Run ``lossguard`` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["lossguard", *map(str, arguments)])
    cli.main()


def same_curves(folder: Path, expected: Path) -> None:
    """Two runs have the same curves and evaluations, bit by bit."""
    for name in (records.CURVES, records.EVALUATIONS):
        found, right = (records.read_parquet(f / name) for f in (folder, expected))
        assert found.schema == right.schema
        for column in right.columns:
            np.testing.assert_array_equal(found[column], right[column])  # NaN equals NaN
