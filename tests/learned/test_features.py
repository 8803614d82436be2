"""The features against NumPy, and where they are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lossguard.learned.lstm import log_and_sign


def in_numpy(gradient: np.ndarray, p: float) -> np.ndarray:
    rows = []
    for g in gradient.astype(np.float64):
        if abs(g) >= np.exp(-p):
            rows.append((np.log(abs(g)) / p, np.sign(g)))
        else:
            rows.append((-1.0, np.exp(p) * g))
    return np.array(rows).T


@pytest.mark.parametrize("p", [1.0, 5.0, 10.0])
def test_equals_numpy(p: float) -> None:
    exponents = np.linspace(-30, 15, 901)
    gradient = np.concatenate([-np.exp(exponents), [0.0], np.exp(exponents)]).astype(np.float32)
    np.testing.assert_allclose(
        log_and_sign(jnp.asarray(gradient), p), in_numpy(gradient, p), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("g", [jnp.nan, jnp.inf, -jnp.inf])
def test_shows_what_is_not_finite(g: float) -> None:
    assert not np.isfinite(log_and_sign(jnp.array([g]))).all()


def test_has_finite_derivatives_everywhere() -> None:
    gradient = jnp.array([0.0, 1e-30, jnp.exp(-10.0), 1.0, -1e4])
    jacobian = jax.jacobian(log_and_sign)(gradient)
    assert np.isfinite(jacobian).all()
