"""Estimates of the meta-gradient against that of the whole unroll, which back-propagation gives."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from lossguard.learned.mlp import mlp_optimizer
from lossguard.metatrain.evolution import like_momentum
from lossguard.metatrain.family import begin, go_on, meta_loss
from lossguard.metatrain.pes import Pairs, Piece, pes_gradient, restart_pairs, start_pairs
from lossguard.tasks import MLP, Task, moons

PIECES, N = 4, 50


def descent(theta: dict[str, Array], inner: Array) -> tuple[Array, Array]:
    """Two steps of gradient descent on a quadratic; the rate also depends on where it is."""
    for _ in range(2):
        rate = jnp.exp(theta["log_rate"] - theta["slowing"] * jnp.sum(inner**2))
        inner = inner - rate * jnp.array([1.0, 0.2]) * inner
    return jnp.sum(jnp.array([1.0, 0.2]) * inner**2) / 2, inner


def whole_gradient(piece: Piece, theta: PyTree, inner: PyTree) -> PyTree:
    def total(theta: PyTree) -> Array:
        def one(at: PyTree, _: None) -> tuple[PyTree, Array]:
            loss, at = piece(theta, at)
            return at, loss

        return jax.lax.scan(one, inner, length=PIECES)[1].sum()

    return jax.grad(total)(theta)


def persistent(piece: Piece, theta: PyTree, inner: PyTree, sigma: float) -> Callable[..., Array]:
    """A function of a key: the sum over the pieces of a rollout of N pairs' estimates."""

    def one(pairs: Pairs, key: Array) -> tuple[Pairs, Array]:
        _, gradient, pairs = pes_gradient(piece, theta, pairs, key, sigma=sigma)
        return pairs, ravel_pytree(gradient)[0]

    def estimate(key: Array) -> Array:
        pairs = start_pairs(theta, copies(inner))
        return jax.lax.scan(one, pairs, jax.random.split(key, PIECES))[1].sum(axis=0)

    return estimate


def truncated(piece: Piece, theta: PyTree, inner: PyTree, sigma: float) -> Callable[..., Array]:
    """Likewise by plain evolution strategies, each piece from where theta itself has led to."""

    def one(at: PyTree, key: Array) -> tuple[PyTree, Array]:
        pairs = start_pairs(theta, copies(at))
        _, gradient, _ = pes_gradient(piece, theta, pairs, key, sigma=sigma)
        _, at = piece(theta, at)
        return at, ravel_pytree(gradient)[0]

    def estimate(key: Array) -> Array:
        return jax.lax.scan(one, inner, jax.random.split(key, PIECES))[1].sum(axis=0)

    return estimate


def copies(inner: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * N), inner)


def errors(estimate: Callable[..., Array], exact: Array, repeats: int) -> np.ndarray:
    """What the mean of many estimates is off, in standard errors."""
    keys = jax.random.split(jax.random.key(0), repeats)
    each = np.asarray(jax.jit(lambda keys: jax.lax.map(estimate, keys))(keys), np.float64)
    return (each.mean(axis=0) - np.asarray(exact)) / (each.std(axis=0, ddof=1) / repeats**0.5)


def test_on_a_quadratic_it_is_unbiased_and_truncated_strategies_are_not() -> None:
    theta = {"log_rate": jnp.float32(-2.0), "slowing": jnp.float32(0.5)}
    inner = jnp.array([1.0, -1.0])
    exact, _ = ravel_pytree(whole_gradient(descent, theta, inner))
    off = errors(persistent(descent, theta, inner, 0.01), exact, 1000)
    assert (np.abs(off) < 4).all()
    assert np.abs(errors(truncated(descent, theta, inner, 0.01), exact, 1000)).min() > 30


def test_on_a_small_network_it_is_unbiased_and_truncated_strategies_are_not() -> None:
    """Along the gradient, of all weights of the learned optimizer."""
    task = Task(moons(samples=500), MLP(()), batch_size=16)
    theta = like_momentum(jax.random.key(1), hidden=2, layers=1, rate=0.05)
    inner = begin(task, mlp_optimizer(theta), jax.random.key(2), jnp.int32(100), rescaling=2.0)

    def piece(theta: PyTree, at: PyTree) -> tuple[Array, PyTree]:
        losses, after = go_on(task, mlp_optimizer(theta), at, 3)
        return meta_loss(losses, jnp.float32(0.69)), after

    exact, _ = ravel_pytree(jax.jit(lambda: whole_gradient(piece, theta, inner))())
    size = jnp.linalg.norm(exact)
    for method, biased in ((persistent, False), (truncated, True)):
        estimate = method(piece, theta, inner, 3e-3)
        off = errors(lambda key, of=estimate: of(key) @ exact / size, size, 100)
        assert (abs(off) > 6) == biased and (abs(off) < 4) != biased, off


def test_a_restart_forgets_the_perturbations_of_what_is_over_and_nothing_else() -> None:
    theta = jnp.zeros(2)
    under_way = Pairs(jnp.ones((3, 2)), -jnp.ones((3, 2)), jnp.full((3, 2), 5.0))
    fresh = start_pairs(theta, jnp.full((3, 2), 7.0))
    after = restart_pairs(under_way, fresh, jnp.array([False, True, False]))
    assert after.plus[:, 0].tolist() == [1, 7, 1]
    assert after.minus[:, 0].tolist() == [-1, 7, -1]
    assert after.walked[:, 0].tolist() == [5, 0, 5]


def test_a_pair_takes_opposite_perturbations_and_goes_on_from_its_own_states() -> None:
    """The states here are all weights that a side has seen, added up."""

    def piece(theta: Array, seen: Array) -> tuple[Array, Array]:
        return theta.sum(), seen + theta

    theta = jnp.array([1.0, 2.0])
    pairs = start_pairs(theta, jnp.zeros((4, 2)))
    for k in range(3):
        losses, gradient, pairs = pes_gradient(piece, theta, pairs, jax.random.key(k), sigma=0.5)
        np.testing.assert_allclose(losses.mean(axis=0), 3.0, rtol=1e-6)
    np.testing.assert_allclose(pairs.plus, 3 * theta + pairs.walked, rtol=1e-5)
    np.testing.assert_allclose(pairs.minus, 3 * theta - pairs.walked, rtol=1e-5)
    slope = (losses[0] - losses[1]) / (2 * 0.5**2)
    np.testing.assert_allclose(gradient, slope @ pairs.walked / 4, rtol=1e-5)
    assert len({float(x) for x in pairs.walked[:, 0]}) == 4


def test_perturbations_have_the_deviation_that_is_asked_for() -> None:
    pairs = start_pairs(jnp.zeros(100), jnp.zeros(200))
    key = jax.random.key(0)
    _, _, pairs = pes_gradient(lambda w, x: (w.sum(), x), jnp.zeros(100), pairs, key, sigma=0.3)
    assert float(pairs.walked.std()) == pytest.approx(0.3, rel=0.03)


@pytest.mark.usefixtures("x64")
def test_weights_of_single_precision_stay_so() -> None:
    theta = {name: jnp.float32(value) for name, value in (("log_rate", -1.0), ("slowing", 0.1))}
    pairs = start_pairs(theta, copies(jnp.ones(2, jnp.float32)))
    _, gradient, _ = pes_gradient(descent, theta, pairs, jax.random.key(0), sigma=0.01)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
