"""What a forward pass changes belongs to a lane, and what a loss reports is of the same lane."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import GUARDS

import lossguard

NT, CYCLES = 2, 40
RELAYS = ("recommended", "hedged")
Y, Z = 0.2, 0.02
"""Rates."""


def made(name: str) -> lossguard.Guard:
    """Of a learned optimizer that is ahead, and then behind."""
    bold = optax.sgd(lambda k: jnp.where(k < 20, Y, -Y / 4))
    return GUARDS[name](bold, optax.sgd(Z))


def square(params, extra, i):
    """Its model state is where it was evaluated last, how often, and a key."""
    count, key = extra["count"] + 1, jax.random.split(extra["key"])[0]
    loss = jnp.sum(params**2) * (1 + 0.1 * jnp.sin(i))
    return loss, {"at": params, "count": count, "key": key}, {"loss": loss, "i": i}


START = {"at": jnp.full(2, jnp.inf), "count": 0, "key": jax.random.key(0)}


@cache
def run(name: str):
    guard = made(name)

    def step(state, _):
        after, decision = guard.step(state, square)
        return after, (after, decision)

    state = guard.init(jnp.ones(2), START)
    return jax.jit(lambda state: jax.lax.scan(step, state, length=CYCLES)[1])(state)


@pytest.mark.parametrize("name", GUARDS)
def test_it_is_that_of_the_parameters_that_are_returned(name) -> None:
    """From where the last pass was, one step of either optimizer leads to them."""
    states, _ = run(name)
    at, ends = np.asarray(states.extra["at"]), np.asarray(states.params)
    # The gradient is a multiple of the point, 2 (1 + sin(i) / 10), with a rate of either.
    ratio = (at - ends) / at
    assert np.ptp(ratio, axis=1) == pytest.approx(0, abs=1e-5)
    slope = ratio[:, 0] / 2
    ranges = [(0.9 * rate, 1.1 * rate) for rate in (Y, Z)] + [(-1.1 * Y / 4, -0.9 * Y / 4)]
    assert all(any(low <= one <= high for low, high in ranges) for one in slope)
    if name != "unguarded":
        assert len({int(np.argmin([abs(one - r) for r in (Y, Z, -Y / 4)])) for one in slope}) > 1
    assert states.extra["at"].dtype == states.params.dtype
    assert states.extra["count"].dtype == jnp.int32


@pytest.mark.parametrize("name", GUARDS)
def test_what_is_reported_is_of_the_lane_that_losses_are_of(name) -> None:
    _, decisions = run(name)
    np.testing.assert_array_equal(decisions.aux["loss"], decisions.losses)
    per_cycle = made(name).per_cycle
    numbers = per_cycle * np.arange(CYCLES)[:, None] + np.arange(NT)
    np.testing.assert_array_equal(decisions.aux["i"], numbers)


def test_checks_change_nothing() -> None:
    """A check goes on from the model state after training, from pass to pass, and is forgotten."""
    seen = []

    def loss(w, count, i):
        jax.debug.callback(lambda count, i: seen.append((int(i), int(count))), count, i)
        return jnp.sum(w**2), count + 1

    guard = lossguard.loss_guard(optax.sgd(0.2), optax.sgd(0.1), nt=2, nc=3)
    state = guard.init(jnp.ones(2), 5)
    for _ in range(2):
        state, decision = jax.jit(lambda state: guard.step(state, loss))(state)
        jax.effects_barrier()
    assert decision.aux is None
    first, second = ({c for i, c in seen if i == n} for n in (4, 9))
    assert (first, second) == ({9}, {11}) and state.extra == 9

    guard = lossguard.best_of(
        [lossguard.unguarded(optax.sgd(rate), nt=2) for rate in (0.1, 0.2)],
        check=lambda w, count, i: (jnp.sum(w**2) + count, count + 1),
    )
    state, decision = guard.step(guard.init(jnp.ones(2), 5), lambda w, c, i: (w @ w, c + 1))
    assert state.extra == 7 and decision.winner == 1


@pytest.mark.parametrize("name", ["recommended", "hedged", "best of", "best of with share"])
def test_a_broken_minibatch_does_not_ruin_it(name) -> None:
    """Statistics that would be NaN for ever stay as they were."""

    def loss(w, mean, x):
        mean = 0.9 * mean + 0.1 * x
        return jnp.sum((w - x) ** 2), mean

    guard = made(name)
    values = jnp.where(jnp.arange(30 * guard.per_cycle) % 7 == 3, jnp.nan, 1.0)
    state, decisions = lossguard.rollout(guard, guard.init(jnp.zeros(2), 0.0), loss, values)
    assert jnp.isfinite(state.extra) and state.extra > 0.5
    assert np.isnan(decisions.losses).any() or np.isinf(decisions.losses).any()


@pytest.mark.parametrize("name", GUARDS)
def test_without_any_the_loss_may_report_too(name) -> None:
    """And a run with a state that nothing depends on is the run without."""
    guard = made(name)
    plain, decisions = lossguard.rollout(
        guard, guard.init(jnp.ones(2)), lambda w, i: (w @ w, w), cycles=CYCLES
    )
    assert plain.extra is None and decisions.aux.shape == (CYCLES, NT, 2)
    np.testing.assert_allclose((decisions.aux**2).sum(axis=2), decisions.losses, rtol=1e-5)
    other, _ = lossguard.rollout(
        guard, guard.init(jnp.ones(2), ()), lambda w, extra, i: (w @ w, extra), cycles=CYCLES
    )
    np.testing.assert_array_equal(other.params, plain.params)


def test_batch_norm_alone_is_the_loop_by_hand() -> None:
    """Running means of an unguarded run, and of a guard whose fallback leads throughout."""
    x = np.random.default_rng(0).normal(2.0, 1.0, (20, 16, 3)).astype(np.float32)

    def loss(w, statistics, batch):
        mean = batch.mean(axis=0)
        normed = (batch - mean) / jnp.sqrt(batch.var(axis=0) + 1e-5)
        return jnp.mean((normed @ w - 1) ** 2), {"mean": 0.9 * statistics["mean"] + 0.1 * mean}

    expected = np.zeros(3)
    for batch in x:
        expected = 0.9 * expected + 0.1 * batch.mean(axis=0)
    for guard in (
        lossguard.unguarded(optax.sgd(0.1), nt=5),
        lossguard.recommended(optax.sgd(-0.1), optax.sgd(0.1), nt=5),
    ):
        state = guard.init(jnp.zeros(3), {"mean": jnp.zeros(3)})
        state, _ = lossguard.rollout(guard, state, loss, x)
        np.testing.assert_allclose(state.extra["mean"], expected, rtol=1e-4)


def test_seeds_side_by_side_each_with_a_key() -> None:
    """As dropout has one: lanes from one point share it, so a trial compares on the same masks."""

    def loss(w, key, x):
        key, own = jax.random.split(key)
        kept = jax.random.bernoulli(own, 0.5, w.shape)
        return jnp.sum((jnp.where(kept, w, 0) - x) ** 2), key

    guard = lossguard.recommended(optax.sgd(0.2), optax.sgd(0.1))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jnp.ones((40, 4))

    def one(key):
        return lossguard.rollout(guard, guard.init(jnp.zeros(4), key), loss, x)

    _, decisions = jax.vmap(one)(keys)
    alone = [one(key)[1].losses for key in keys]
    np.testing.assert_allclose(decisions.losses, jnp.stack(alone), rtol=1e-5)
    assert len({float(losses.sum()) for losses in alone}) == 3
    own = lossguard.recommended(optax.sgd(0.1), optax.sgd(0.1))
    _, decision = own.step(own.init(jnp.zeros(4), keys[0]), loss, x[:10])
    assert decision.learned_loss == decision.fallback_loss  # on the same masks


@pytest.mark.parametrize(("rate", "winner"), [(0.2, 0), (-0.1, 2)])
def test_the_leader_goes_on_from_what_is_put_there(rate, winner) -> None:
    guard = lossguard.recommended(optax.sgd(rate), optax.sgd(0.02), nt=NT)
    state = guard.init(jnp.ones(2), START)
    step = jax.jit(lambda state: guard.step(state, square))
    for _ in range(8):
        state, decision = step(state)
    edited, _ = step(state._replace(extra=state.extra | {"count": jnp.int32(100)}))
    assert decision.winner == winner and edited.extra["count"] == 100 + NT
