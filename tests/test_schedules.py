"""The schedules are their formulas, and only one of them has the sums of Theorem 7."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lossguard

positive = st.floats(1e-4, 1e4)


@given(rate=positive, tau=positive, power=st.floats(0.1, 3.0), t=st.integers(0, 10**7))
def test_paper_decay(rate, tau, power, t) -> None:
    expected = rate / (t / tau + 1) ** power
    schedule = lossguard.paper_decay(rate, tau, power=power)
    np.testing.assert_allclose(schedule(t), expected, rtol=1e-4)
    np.testing.assert_allclose(schedule(jnp.int32(t)), expected, rtol=1e-4)


@given(rate=positive, offset=positive, t=st.integers(0, 10**7))
def test_harmonic_decay(rate, offset, t) -> None:
    schedule = lossguard.harmonic_decay(rate, offset)
    np.testing.assert_allclose(schedule(t), rate * offset / (offset + t), rtol=1e-5)
    np.testing.assert_allclose(schedule(jnp.int32(t)), rate * offset / (offset + t), rtol=1e-5)


@pytest.mark.parametrize("make", [lossguard.paper_decay, lossguard.harmonic_decay])
def test_rates_side_by_side_under_strict_promotion(make) -> None:
    rates = jnp.array([0.1, 0.3])
    with jax.numpy_dtype_promotion("strict"):
        found = jax.vmap(lambda rate: make(rate, 20.0)(jnp.int32(10)))(rates)
    np.testing.assert_allclose(found, [make(0.1, 20.0)(10), make(0.3, 20.0)(10)], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lossguard.paper_decay(0.0), "rate must be positive and finite, got 0.0"),
        (lambda: lossguard.paper_decay(1.0, tau=-2.0), "tau must be positive and finite, got -2.0"),
        (lambda: lossguard.paper_decay(1.0, power=-1), "power must be positive and finite, got -1"),
        (lambda: lossguard.harmonic_decay(-1.0, 5.0), "rate must be positive and finite, got -1.0"),
        (lambda: lossguard.harmonic_decay(1.0, 0.0), "offset must be positive and finite, got 0.0"),
        (lambda: lossguard.paper_decay(float("nan")), "rate must be positive and finite, got nan"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
