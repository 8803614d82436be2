"""Algorithm 1 as an optax transformation: any optax loop can use it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from problems import quadratic

import lossguard

START = jnp.array([3.0, -2.0, 0.5])


def f(w):
    return jnp.sum(w**2) / 2


def run(optimizer, value_fn, steps: int, start=START):
    """The loop of optax's documentation, and what was used at each step."""

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(value_fn)(x)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=value_fn)
        return optax.apply_updates(x, updates), state

    x, state = start, optimizer.init(start)
    iterates, used = [], []
    for _ in range(steps):
        x, state = step(x, state)
        iterates.append(x)
        used.append(bool(state.used_learned))
    return np.array(iterates), used


@pytest.mark.usefixtures("x64")
def test_is_algorithm_1() -> None:
    """Against a plain loop; both optimizers' states run on from every step, as they do by default
    in the loss guard with nt = nc = 1, which does the same."""
    problem = quadratic(jax.random.key(0), n=3, mu=0.1, L=1.0, distance=3.0)
    learned, fallback = optax.sgd(1.5, momentum=0.6), optax.sgd(1.0)
    start = jnp.zeros(3)
    iterates, used = run(lossguard.guarded(learned, fallback), problem, 40, start)
    assert set(used) == {True, False}

    x, velocity = np.zeros(3), np.zeros(3)
    for k in range(40):
        gradient = np.asarray(jax.grad(problem)(jnp.asarray(x)))
        velocity = gradient + 0.6 * velocity
        y, z = x - 1.5 * velocity, x - 1.0 * gradient
        x = y if problem(jnp.asarray(y)) < problem(jnp.asarray(z)) else z
        np.testing.assert_allclose(iterates[k], x, rtol=1e-8, atol=1e-10)

    guard = lossguard.loss_guard(learned, fallback, nt=1, nc=1)
    _, decisions = lossguard.rollout(guard, guard.init(start), problem, cycles=40)
    np.testing.assert_array_equal(decisions.used_learned[:, 0], used)


@pytest.mark.parametrize(
    "learned",
    [
        optax.adam(0.3),
        optax.polyak_sgd(),
        optax.lbfgs(memory_size=2),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        optax.contrib.prodigy(),
    ],
    ids=["adam", "polyak_sgd", "lbfgs", "backtracking", "prodigy"],
)
def test_it_never_goes_up(learned) -> None:
    iterates, _ = run(lossguard.guarded(learned, optax.sgd(0.1)), f, 5)
    values = [f(START), *map(f, iterates)]
    assert (np.diff(values) <= 0).all()
    assert values[-1] < values[0] / 2


def test_it_is_an_ordinary_transformation() -> None:
    """In a chain, it sees what comes before; what comes after has the last word."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        lossguard.guarded(optax.sgd(1e3), optax.sgd(1.0)),
        optax.scale(0.5),
    )
    updates, _ = optimizer.update(START, optimizer.init(START), START, value_fn=f)
    np.testing.assert_allclose(
        jnp.asarray(updates), -0.5 * START / jnp.linalg.norm(START), rtol=1e-6
    )


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fault", optimizers.FAULTS)
@pytest.mark.parametrize("bad", [{"learned"}, {"fallback"}, {"learned", "fallback"}])
def test_what_is_not_finite_is_not_taken(bad, fault, value) -> None:
    """At step 2, in parameters, losses (beyond 100) or optimizer state."""

    def value_fn(w):
        return jnp.where(jnp.abs(w).max() > 100, value, f(w))

    def one(side, rate):
        if side not in bad:
            return optax.sgd(rate)
        return optimizers.faulty(rate, at=2, fault=fault, value=value)

    optimizer = lossguard.guarded(one("learned", 0.3), one("fallback", 0.1))
    iterates, used = run(optimizer, value_fn, 5)
    assert np.isfinite(iterates).all()
    shrunk = iterates[:, 0] / np.array([START[0], *iterates[:-1, 0]])
    if fault == "state":  # a memory that is spoilt after the update is made anew
        np.testing.assert_allclose(shrunk, 0.7, rtol=1e-5)
    else:
        in_time = {1: 0.9 if "learned" in bad else 0.7, 2: 1.0}[len(bad)]
        np.testing.assert_allclose(shrunk, [0.7, 0.7, in_time, 0.7, 0.7], rtol=1e-5)
        assert used[2] == (bad == {"fallback"})


def test_ties_go_to_the_fallback() -> None:
    _, used = run(lossguard.guarded(optax.sgd(0.1), optax.sgd(0.1)), f, 3)
    assert used == [False] * 3
