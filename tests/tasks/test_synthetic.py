"""The answers that are said to be known are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lossguard.tasks import Noisy, quadratic, ridge_logistic

PROBLEMS = {
    "quadratic": lambda: quadratic(jax.random.key(0), n=7, mu=0.01, L=3.0, distance=2.0),
    "ridge": lambda: ridge_logistic(jax.random.key(1), n=4, samples=60, mu=0.05),
    "ridge, separable": lambda: ridge_logistic(jax.random.key(2), n=3, mu=1e-3, flipped=0.0),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_minimum_and_the_curvature(name) -> None:
    problem = PROBLEMS[name]()
    w, mu, L = problem.minimum, float(problem.mu), float(problem.L)

    @jax.jit
    def at(w):
        hessian, gradient = jax.hessian(problem)(w), jax.grad(problem)(w)
        return problem(w), problem.excess(w), gradient, jnp.linalg.eigvalsh(hessian)

    lowest, _, gradient, _ = at(w)
    assert np.linalg.norm(gradient) < 1e-12
    assert problem.excess(w) == 0
    for seed in range(5):
        far = w + 3 * np.random.default_rng(seed).standard_normal(w.shape)
        value, excess, gradient, eigenvalues = map(np.asarray, at(far))
        assert eigenvalues[0] >= mu * (1 - 1e-9)
        assert eigenvalues[-1] <= L * (1 + 1e-9)
        np.testing.assert_allclose(excess, value - lowest, rtol=1e-9)
        # What the theorems rest on: mu/2 d^2 <= E <= L/2 d^2, and 2 mu E <= |grad f|^2 <= 2 L E.
        distance, slope = np.sum((far - w) ** 2), np.sum(gradient**2)
        assert mu / 2 * distance <= excess <= L / 2 * distance
        assert 2 * mu * excess <= slope <= 2 * L * excess


@pytest.mark.usefixtures("x64")
def test_a_quadratic_has_the_eigenvalues_and_the_distance_asked_for() -> None:
    problem = quadratic(jax.random.key(3), n=5, mu=0.01, L=100.0, distance=4.0)
    eigenvalues = jnp.linalg.eigvalsh(jax.hessian(problem)(jnp.zeros(5)))
    np.testing.assert_allclose(eigenvalues, [0.01, 0.1, 1.0, 10.0, 100.0], rtol=1e-9)
    np.testing.assert_allclose(jnp.linalg.norm(problem.minimum), 4.0, rtol=1e-9)


@pytest.mark.parametrize("flipped", [0.3, 1.0, 1])
def test_a_share_of_the_labels_is_flipped(flipped) -> None:
    """Of those of a linear rule, which others keep to."""
    right, wrong = (
        ridge_logistic(jax.random.key(4), samples=4_000, flipped=share) for share in (0.0, flipped)
    )
    np.testing.assert_array_equal(right.inputs, wrong.inputs)
    share = np.mean(np.asarray(right.labels != wrong.labels))
    np.testing.assert_allclose(share, flipped, atol=0.03)


@pytest.mark.parametrize("name", ["quadratic", "ridge"])
def test_noise_is_unbiased_of_deviation_sigma_and_new_on_every_minibatch(name) -> None:
    problem, sigma = PROBLEMS[name](), 0.7
    noisy = Noisy(problem, jax.random.key(5), sigma)
    w = jnp.ones_like(problem.minimum)
    gradients = jax.vmap(jax.grad(noisy), (None, 0))(w, jnp.arange(20_000))
    error = gradients - jax.grad(problem)(w)
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=4 * sigma / 20_000**0.5)
    np.testing.assert_allclose(jnp.sum(error**2, axis=1).mean(), sigma**2, rtol=0.03)
    consecutive = jnp.sum(error[1:] * error[:-1], axis=1).mean()
    np.testing.assert_allclose(consecutive, 0, atol=0.02)
    np.testing.assert_array_equal(jax.grad(noisy)(w, 7), jax.grad(noisy)(w, 7))
    assert noisy.excess(w) == problem.excess(w)
    assert (noisy.mu, noisy.L) == (problem.mu, problem.L)


@pytest.mark.parametrize("i", [-1, 0, 2**31 - 1])
def test_noise_of_a_plain_number_is_that_of_an_array(i) -> None:
    noisy = Noisy(quadratic(jax.random.key(0)), jax.random.key(1), sigma=1.0)
    assert noisy(jnp.ones(10), i) == noisy(jnp.ones(10), jnp.int32(i))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quadratic(jax.random.key(0), n=1), "n must be an integer of at least 2, got 1"),
        (lambda: quadratic(jax.random.key(0), mu=0.0), "mu must be above 0 and at most L = 1.0"),
        (lambda: quadratic(jax.random.key(0), mu=2.0), "at most L = 1.0, got 2.0"),
        (lambda: quadratic(jax.random.key(0), L=jnp.inf), "L must be positive and finite, got inf"),
        (
            lambda: quadratic(jax.random.key(0), distance=-1.0),
            "distance must be at least 0 and finite, got -1.0",
        ),
        (
            lambda: ridge_logistic(jax.random.key(0), samples=0),
            "samples must be an integer of at least 1",
        ),
        (
            lambda: ridge_logistic(jax.random.key(0), mu=0.0),
            "mu must be positive and finite, got 0.0",
        ),
        (lambda: ridge_logistic(jax.random.key(0), flipped=1.5), "between 0 and 1, got 1.5"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
