"""Minibatches as data: arrays of a cycle, of several, or functions of a cycle's number."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import GUARDS

import lossguard

NT, NC, CYCLES = 2, 1, 12
SGD = optax.sgd(0.1)


def loss(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def batches(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 8, 3)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(x.sum(axis=2) + 0.1 * rng.standard_normal((count, 8)))


def made(name: str) -> lossguard.Guard:
    """Of a learned optimizer that is ahead, and then behind."""
    bold = optax.sgd(lambda k: jnp.where(k < 12, 0.2, -0.05))
    return GUARDS[name](bold, optax.sgd(0.02))


@pytest.mark.parametrize("name", GUARDS)
def test_given_or_drawn_by_number_they_are_the_same(name) -> None:
    """One cycle after another from the host, all at once, by a function, and by their numbers."""
    guard = made(name)
    count = guard.per_cycle
    assert count == NT + NC * (name in ("keep", "reset", "best of"))
    data = batches(CYCLES * count)
    traces = []

    @partial(jax.jit, donate_argnums=0)
    def step(state, minibatches):
        traces.append(1)
        return guard.step(state, loss, minibatches)

    state, losses = guard.init(jnp.zeros(3)), []
    for cycle in range(CYCLES):
        rows = slice(cycle * count, (cycle + 1) * count)
        state, decision = step(state, jax.tree.map(lambda leaf, r=rows: np.asarray(leaf[r]), data))
        losses.append(np.asarray(decision.losses))
    assert len(traces) == 1
    assert state.minibatches == CYCLES * count

    by_cycle = jax.tree.map(lambda leaf: leaf.reshape(CYCLES, count, *leaf.shape[1:]), data)
    ways = {
        "arrays": lambda state: lossguard.rollout(guard, state, loss, data),
        "NumPy's": lambda state: lossguard.rollout(
            guard, state, loss, jax.tree.map(np.asarray, data)
        ),
        "a function": lambda state: lossguard.rollout(
            guard,
            state,
            loss,
            lambda c: jax.tree.map(lambda leaf: leaf[c], by_cycle),
            cycles=CYCLES,
        ),
        "numbers": lambda state: lossguard.rollout(
            guard, state, lambda w, i: loss(w, (data[0][i], data[1][i])), cycles=CYCLES
        ),
    }
    for way in ways.values():
        after, decisions = way(guard.init(jnp.zeros(3)))
        np.testing.assert_allclose(after.params, state.params, rtol=1e-5)
        np.testing.assert_allclose(decisions.losses, losses, rtol=1e-4)
        assert after.minibatches == state.minibatches


def test_a_function_is_given_the_number_of_a_cycle_of_the_run() -> None:
    """So a run that is taken up again goes on with the minibatches that it would have had."""
    guard = lossguard.loss_guard(SGD, SGD, nt=2, nc=1)
    draw = lambda cycle: 10 * cycle + jnp.arange(3)  # noqa: E731
    state = guard.init(jnp.float32(0))
    seen = []
    for _ in range(2):
        state, decisions = lossguard.rollout(guard, state, lambda w, i: (w, i), draw, cycles=2)
        seen += decisions.aux.tolist()
    assert seen == [[0, 1], [10, 11], [20, 21], [30, 31]]


def test_members_of_best_of_get_what_they_take() -> None:
    """Here one checks on the third minibatch of each cycle, which the other one doesn't see."""
    ours = lossguard.loss_guard(SGD, SGD, nt=2, nc=1)
    guard = lossguard.best_of([lossguard.unguarded(optax.sgd(0.2), nt=2), ours])
    assert guard.per_cycle == 3

    def told(w, i):
        return (w - i) ** 2, i

    _, decision = guard.step(guard.init(jnp.float32(0)), told, jnp.arange(3.0) + 7)
    assert decision.aux.tolist() == [7, 8]


@pytest.mark.parametrize(
    ("minibatches", "options", "message"),
    [
        (jnp.arange(7), {}, "a multiple of 3, got [7]"),
        ((jnp.arange(6), jnp.arange(9)), {}, "a multiple of 3, got [6, 9]"),
        (jnp.arange(0), {}, "a multiple of 3, got [0]"),
        (3.0, {}, "a multiple of 3, got [0]"),
        ({}, {}, "a multiple of 3, got no arrays"),
        (jnp.arange(6), {"cycles": 3}, "cycles must be 2, of which minibatches are, got 3"),
        (jnp.arange(6), {"most": 3}, "most must go with minibatches that are a function"),
        (None, {}, "cycles must be given, unless minibatches are arrays"),
        (lambda c: jnp.arange(3), {}, "cycles must be given, unless minibatches are arrays"),
        (lambda c: jnp.arange(2), {"cycles": 1}, "first axis are the 3 of a cycle, got ['2']"),
    ],
)
def test_what_is_no_whole_cycle_is_refused(minibatches, options, message) -> None:
    guard = lossguard.loss_guard(SGD, SGD, nt=2, nc=1)
    start = guard.init(jnp.ones(2))
    with pytest.raises(ValueError) as error:
        lossguard.rollout(guard, start, lambda w, i: jnp.sum(w**2) * i, minibatches, **options)
    assert message in str(error.value)
