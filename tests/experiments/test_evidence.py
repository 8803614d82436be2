"""What is measured on figures: values at marks, and their intervals over seeds."""

import math

import numpy as np
import polars as pl
import pytest

from lossguard.experiments.claims import over, short
from lossguard.experiments.evidence import Evidence, NotRunError


def test_an_interval_is_that_of_a_bootstrap() -> None:
    """Of a ratio of means, by NumPy; where a loss is not finite it reaches to infinity."""
    random = np.random.default_rng(1)
    a, b = random.normal(2.0, 0.5, 8), random.normal(1.0, 0.1, 8)
    each = pl.DataFrame({"step": 100, "seed": range(8), "loss_A": a, "loss_B": b})
    drawn = random.integers(8, size=(20_000, 8))
    expected = np.quantile(a[drawn].mean(axis=1) / b[drawn].mean(axis=1), (0.025, 0.975))
    found = Evidence(each).measure(over("A", "B"), 100)
    assert found[:2] == (pytest.approx(a.mean() / b.mean()), 8)
    np.testing.assert_allclose(found[2:], expected, rtol=0.03)
    lost = each.with_columns(loss_A=pl.when(pl.col("seed") == 0).then(math.nan).otherwise("loss_A"))
    value, _, low, high = Evidence(lost).measure(over("A", "B"), 100)
    assert low < expected[1] and high == value == math.inf


def test_what_is_measured_is_of_seeds_and_steps_that_all_have() -> None:
    """An expression has the marks up to k, of the seeds that get there with all it names."""
    marks = pl.DataFrame(
        {"step": [1, 1, 1, 9, 9, 10, 10, 10], "seed": [0, 1, 2, 0, 1, 0, 1, 2]}
        | {"loss_A": [4.0, 4.0, 8.0, 9.0, 9.0, 1.0, 3.0, 5.0]}
        | {"loss_B": [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, None]}
    )
    first, evidence = pl.col("loss_A") / pl.col("loss_A").first(), Evidence(marks)
    assert evidence.measure(first, 10)[:2] == (pytest.approx(9 / 16), 3)
    assert evidence.measure(pl.col("loss_A").max(), 10).value == pytest.approx(16 / 3)
    assert evidence.measure(first / pl.col("loss_B"), 10)[:2] == (pytest.approx(1 / 4), 2)
    above = pl.col("step").filter(pl.col("loss_A") > 3 * pl.col("loss_B")).max()
    assert evidence.measure(above, 10)[:2] == (9, 2)
    for value, k, told in (
        (pl.col("loss_C"), 10, "no run has C"),
        (pl.col("used_learned_A") / pl.col("loss_A"), 10, "no run has A"),
        (pl.col("loss_A"), 30, "not run to 30: A"),
    ):
        with pytest.raises(NotRunError, match=told):
            evidence.measure(value, k)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, "0"),
        (9.44e-5, "9.4e-5"),
        (0.0149, "0.015"),
        (1.0, "1"),
        (2.449, "2.4"),
        (123.0, "120"),
        (4715.0, "4700"),
        (23_499.0, "2.3e4"),
        (math.nan, "inf"),
    ],
)
def test_two_digits(value: float, told: str) -> None:
    assert short(value) == told
