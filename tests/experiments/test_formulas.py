"""The numbers of formulas: intervals over seeds, and how they are told."""

import math

import numpy as np
import polars as pl
import pytest

from lossguard.experiments.evidence import interval
from lossguard.experiments.formulas import over, short


def test_an_interval_is_that_of_a_bootstrap() -> None:
    """Of a ratio of means, by NumPy; where a loss is not finite it reaches to infinity."""
    random = np.random.default_rng(1)
    a, b = random.normal(2.0, 0.5, 8), random.normal(1.0, 0.1, 8)
    each = pl.DataFrame({"step": 100, "seed": range(8), "A": a, "B": b})
    drawn = random.integers(8, size=(20_000, 8))
    expected = np.quantile(a[drawn].mean(axis=1) / b[drawn].mean(axis=1), (0.025, 0.975))
    found = interval(each, over("A", "B"))
    np.testing.assert_allclose(found, expected, rtol=0.03)
    lost = each.with_columns(A=pl.when(pl.col("seed") == 0).then(math.nan).otherwise("A"))
    low, high = interval(lost, over("A", "B"))
    assert low < expected[1] and high == math.inf


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
