"""The figure of a meta-training."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

from lossguard import drawing
from lossguard.metatrain import figure
from lossguard.records import Record


@pytest.mark.parametrize("steps", [8, 60, 100, 300])
def test_figure_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The lines are the record's: windows of 50 validation steps, the row that was kept."""
    drawn: list[Figure] = []
    monkeypatch.setattr(
        figure, "save", lambda of, folder: drawn.append(of) or drawing.save(of, folder)
    )
    validation, moons = 1 + np.random.default_rng(0).random((2, 4, steps))
    validation[2] = np.nan
    columns = {"meta_step": [1, 2, 3, 4], "meta_loss": [4.0, 3.0, 2.0, 1.0]}
    columns |= {"validation": validation, "validation_moons": moons}
    record = Record({"name": "mine $_{$"}, {"data": "JPEG q75"}, pl.DataFrame(columns))
    file = figure.plot(tmp_path, record)
    assert file.read_bytes().startswith(b"\x89PNG")

    assert drawn[0].get_suptitle() == "mine $_{$ (JPEG q75)"
    left, right, others = ([line.get_ydata() for line in of.lines] for of in drawn[0].axes)
    first = {8: [0], 60: [0, 10], 100: [0, 50], 300: [0, 50, 250]}[steps]
    means = [validation[:, i : i + 50].mean(axis=1) for i in first]
    np.testing.assert_allclose(left, [[4.0, 3.0, 2.0, 1.0], *means])
    kept = np.nanargmin(validation.mean(axis=1))
    np.testing.assert_array_equal(right, [validation[0], validation[kept]])
    np.testing.assert_allclose(others, [moons[:, :100][:, -10:].mean(axis=1) / moons[:, 0]])


def test_figure_where_all_is_lost(tmp_path: Path) -> None:
    columns = {"meta_step": [1, 2], "meta_loss": [1.0, 1.0], "validation": np.full((2, 60), np.nan)}
    record = Record({"name": "mine"}, {}, pl.DataFrame(columns))
    assert figure.plot(tmp_path, record).is_file()
