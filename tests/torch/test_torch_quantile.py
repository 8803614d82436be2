"""Student's quantiles are SciPy's."""

import numpy as np
import pytest
from scipy.special import stdtrit

from lossguard.torch.quantile import student_quantile


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 10, 39, 159, 160, 1001])
def test_quantiles_are_scipys(df: int) -> None:
    levels = [0.5, 0.6, 0.7, 0.9, 0.95, 0.99, 0.9975, 1 - 1e-6]
    found = [student_quantile(df, level) for level in levels]
    np.testing.assert_allclose(found, stdtrit(df, levels), rtol=1e-9, atol=1e-12)
