"""Speedups, their smoothing and their mean, on made-up curves for which the answer is known."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lossguard.experiments.envelope import FILE, Envelope, envelope, interquartile_mean, smoothed
from lossguard.tasks.published import PUBLISHED

FALLING = Envelope(np.array([0.0, 100, 200, 1_000]), 2.0 ** -np.array([0.0, 1, 2, 10]))


@pytest.mark.parametrize(
    ("loss", "steps"),
    [(0.5, 100), (2.0**-1.5, 150), (2.0**-6, 600), (1.5, 0), (0, 1_000), (np.inf, 0), (np.nan, 0)],
)
def test_steps_to_a_loss(loss: float, steps: float) -> None:
    assert float(FALLING.steps_to(loss)) == pytest.approx(steps)


def test_at_and_steps_to_are_inverse() -> None:
    for step in (50.0, 150.0, 800.0):
        assert float(FALLING.steps_to(FALLING.at(step))) == pytest.approx(step)


def test_smoothing_of_a_falling_line_lags_nineteen_losses() -> None:
    """The steady lag of y <- d y + (1 - d) x behind a ramp is d / (1 - d)."""
    ramp = np.arange(2_000.0)
    assert ramp[-1] - smoothed(ramp)[-1] == pytest.approx(19)
    np.testing.assert_allclose(smoothed(np.full((2, 30), 7.0)), 7.0)


def test_smoothing_is_the_recursion_of_each_row() -> None:
    losses = np.random.default_rng(0).uniform(size=(3, 50))
    for row, made in zip(losses, smoothed(losses), strict=True):
        y = row[0]
        for loss, value in zip(row, made, strict=True):
            y = y if loss == row[0] else 0.95 * y + 0.05 * loss
            assert value == pytest.approx(y)


def test_a_loss_that_is_not_finite_stays() -> None:
    assert not np.isfinite(smoothed(np.array([1.0, np.inf, 1.0, 1.0]))[1:]).any()


def test_the_mean_is_of_the_middle_half() -> None:
    scores = [np.array([0.0, 1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0, 1_000.0])]
    assert interquartile_mean(scores, draws=10).value == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_one_seed_has_no_interval() -> None:
    value, low, high = interquartile_mean([np.array([1.0]), np.array([3.0])])
    assert value == 2.0 and np.isnan([low, high]).all()


def test_the_interval_draws_seeds_within_tasks_only() -> None:
    """Tasks that differ, but whose seeds agree, leave no uncertainty; seeds that differ do."""
    sure = interquartile_mean([np.full(5, 1.0), np.full(5, 9.0)], draws=50)
    assert sure.low == sure.value == sure.high == 5.0
    rng = np.random.default_rng(1)
    normal = [rng.normal(size=500) for _ in range(2)]
    value, low, high = interquartile_mean(normal, draws=1_000)
    # The asymptotic variance of a trimmed mean of normals is 1.19 / n for a quarter on each side.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(1.19 / 1_000), rel=0.2)
    assert low < value < high
    assert value == pytest.approx(stats.trim_mean(np.concatenate(normal), 0.25))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as the published one, of one task."""
    path = tmp_path / "baselines.json"
    path.write_text(json.dumps({"a": [[0, 100], [2.0, 0.5]]}))
    monkeypatch.setenv(FILE, str(path))
    return path


@pytest.mark.usefixtures("file")
def test_it_is_read_from_the_published_file() -> None:
    assert envelope("a").at(50) == pytest.approx(1.0)  # the geometric mean


@pytest.mark.skipif(FILE not in os.environ, reason=f"{FILE} names no published file")
@pytest.mark.parametrize("task", PUBLISHED)
def test_the_published_file_has_every_task(task: str) -> None:
    published = envelope(task)
    assert published.steps[0] == 0 and published.steps[-1] == pytest.approx(100_000)
    assert (np.diff(published.steps) > 0).all() and (np.diff(published.loss) <= 0).all()


@pytest.mark.skipif(FILE not in os.environ, reason=f"{FILE} names no published file")
def test_losses_are_those_of_the_published_file() -> None:
    """Two that the file has, and whose they are."""
    assert envelope("ImageMLP_FashionMnist_Relu128x128").at(978) == pytest.approx(0.373, abs=1e-3)
    assert envelope("ImageMLP_Mnist_128x128x128_Relu").at(1_957) == pytest.approx(0.051, abs=1e-3)


@pytest.mark.usefixtures("file")
def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^task of an envelope must be one of a, got 'mnist'"):
        envelope("mnist")
