"""The figure of a meta-training."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lossguard.metatrain import figure
from lossguard.runs.drawing import save
from lossguard.runs.records import Record


@pytest.mark.parametrize("steps", [8, 60, 100, 300])
def test_figure_of_any_length(tmp_path: Path, steps: int) -> None:
    """The lines are the record's: windows of 50 validation steps, the row that was kept."""
    validation, moons = 1 + np.random.default_rng(0).random((2, 4, steps))
    validation[2] = np.nan
    columns = {"meta_step": [1, 2, 3, 4], "meta_loss": [4.0, 3.0, 2.0, 1.0]}
    columns |= {"validation": validation, "validation_moons": moons}
    record = Record({"name": "mine $_{$"}, {"data": "JPEG"}, pl.DataFrame(columns))
    drawn = figure.draw(record)
    assert save(drawn, tmp_path).read_bytes().startswith(b"\x89PNG")

    assert drawn.get_suptitle() == "mine $_{$ (JPEG)"
    assert drawn.axes[2].get_ylabel() == f"Mean of steps {max(1, steps - 9)} to {steps} / first"
    left, right, others = ([line.get_ydata() for line in of.lines] for of in drawn.axes)
    first = {8: [0], 60: [0, 10], 100: [0, 50], 300: [0, 50, 250]}[steps]
    means = [validation[:, i : i + 50].mean(axis=1) for i in first]
    np.testing.assert_allclose(left, [[4.0, 3.0, 2.0, 1.0], *means])
    kept = np.nanargmin(validation.mean(axis=1))
    np.testing.assert_array_equal(right, [validation[0], validation[kept]])
    np.testing.assert_allclose(others, [moons[:, -10:].mean(axis=1) / moons[:, 0]])


def test_logarithms_are_not_drawn_as_losses() -> None:
    """Nor where the family's diverge, and they are above zero."""
    columns = {"meta_step": [1, 2], "meta_loss": [0.7, 0.8], "validation": np.ones((2, 60))}
    left, right = figure.draw(
        Record({"name": "mine", "family": []}, {}, pl.DataFrame(columns))
    ).axes
    assert [line.get_label() for line in left.lines] == [
        "validation, steps 1 to 50", "validation, steps 11 to 60",
    ]  # fmt: skip
    assert left.get_ylabel() == "Loss over reference"
    assert right.get_ylabel() == "Validation loss over reference"


def test_fresh_weights_are_drawn_and_not_kept() -> None:
    columns = {"meta_step": [0, 5, 10], "meta_loss": [np.nan, 6.0, 5.0]}
    columns |= {"validation": np.outer([1.0, 3.0, 2.0], np.ones(60))}
    left, right = figure.draw(Record({"name": "mine"}, {}, pl.DataFrame(columns))).axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), columns["meta_loss"])
    assert [line.get_label() for line in right.lines] == ["meta-step 0", "meta-step 10, kept"]


def test_lines_of_several_seeds_are_means_with_bands() -> None:
    """The weights kept are those of each seed by itself."""
    validation, moons = 1 + np.random.default_rng(0).random((2, 3, 2, 60))
    validation[:, 1] -= [[0.5], [-0.5], [0.5]]  # of seed 1 the first are kept
    columns = {"seed": [0, 0, 1, 1, 2, 2], "meta_step": [5, 10] * 3, "meta_loss": [6.0, 5] * 3}
    columns |= {"validation": validation.reshape(6, 60), "validation_moons": moons.reshape(6, 60)}
    drawn = figure.draw(Record({"name": "mine"}, {}, pl.DataFrame(columns)))
    assert drawn.get_suptitle() == "mine, 3 meta-seeds"
    for axes, lines in zip(drawn.axes, (3, 2, 1), strict=True):
        assert len(axes.lines) == len(axes.collections) == lines
    left, right, others = drawn.axes
    np.testing.assert_allclose(
        left.lines[1].get_ydata(), validation[:, :, :50].mean(axis=2).mean(axis=0)
    )
    band = left.collections[1].get_datalim(left.transData)
    first = validation[:, :, :50].mean(axis=2)
    np.testing.assert_allclose([band.y0, band.y1], [first.min(), first.max()])
    each = [validation[0, 1], validation[1, 0], validation[2, 1]]
    np.testing.assert_allclose(right.lines[1].get_ydata(), np.mean(each, axis=0))
    assert right.lines[1].get_label() == "meta-step 5 and 10, kept"
    ratios = moons[:, :, 50:].mean(axis=2) / moons[:, :, 0]
    np.testing.assert_allclose(others.lines[0].get_ydata(), ratios.mean(axis=0))


def test_seeds_of_other_lengths_are_refused() -> None:
    columns = {"seed": [0, 0, 1], "meta_step": [5, 10, 5], "meta_loss": [1.0] * 3}
    columns |= {"validation": np.ones((3, 60))}
    with pytest.raises(ValueError, match=r"^meta-seeds of a record must have the same meta-steps$"):
        figure.draw(Record({"name": "mine"}, {}, pl.DataFrame(columns)))


def test_figure_where_all_is_lost(tmp_path: Path) -> None:
    columns = {"meta_step": [1, 2], "meta_loss": [1.0, 1.0], "validation": np.full((2, 60), np.nan)}
    record = Record({"name": "mine"}, {}, pl.DataFrame(columns))
    assert save(figure.draw(record), tmp_path).is_file()
