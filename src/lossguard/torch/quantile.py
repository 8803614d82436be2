"""Quantiles of Student's t, without SciPy: whole degrees of freedom have a closed form."""

import math
from functools import cache


@cache
def student_quantile(df: int, probability: float) -> float:
    """The t below which a variable with Student's distribution falls at a probability.

    With theta = atan(t / sqrt(df)) and c = cos(theta), Abramowitz and Stegun (1964), 26.7.3 and
    26.7.4, have P(|T| <= t) as

        2 / pi (theta + sin(theta) (c + 2/3 c^3 + 2/3 4/5 c^5 + ... c^(df-2)))   odd df
        sin(theta) (1 + 1/2 c^2 + 1/2 3/4 c^4 + ... c^(df-2))                    even df

    which grows with theta, so that bisection inverts it.

    Args:
        df: degrees of freedom, at least 1.
        probability: at least 0.5 and below 1.

    >>> round(student_quantile(1, 0.75), 12), round(student_quantile(10, 0.95), 4)
    (1.0, 1.8125)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        if (1 + _within(df, theta)) / 2 < probability:
            low = theta
        else:
            high = theta
    return math.sqrt(df) * math.tan((low + high) / 2)


def _within(df: int, theta: float) -> float:
    """P(|T| <= sqrt(df) tan(theta))."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, df - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return (theta + sine * total) * 2 / math.pi if odd else sine * total
