"""NaN and infinity at any step, on either side, in parameters, losses and optimizer states."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

import lossguard

NT, NC, CYCLES = 2, 2, 16
NEVER = 10_000
START = jnp.array([3.0, -2.0, 0.5])

LOSS_GUARDS = {
    loser: lambda y, z, loser=loser: lossguard.loss_guard(y, z, nt=NT, nc=NC, loser=loser)
    for loser in ("keep", "reset")
}
RELAYS = {
    name: lambda y, z, make=make: make(y, z, nt=NT, share=0.2)
    for name, make in {"recommended": lossguard.recommended, "hedged": lossguard.hedged}.items()
}
RESIDUAL = {"residual": lambda y, z: lossguard.residual_guard(y, z, nt=NT)}
GUARDS = LOSS_GUARDS | RELAYS | RESIDUAL

values = st.sampled_from([np.nan, np.inf, -np.inf])
steps = st.one_of(st.integers(0, NT * CYCLES - 1), st.just(NEVER))
faults = st.tuples(steps, st.sampled_from(range(len(optimizers.FAULTS))), values)


def excess(w: jax.Array) -> jax.Array:
    return jnp.sum(w**2) / 2


@cache
def player(name: str):
    """A compiled run with a fault of each optimizer, a bad minibatch, and a bad region."""

    def play(learned_fault, fallback_fault, minibatch, minibatch_value, region_value):
        def objective(w, i):
            loss = excess(w) * jnp.where(i == minibatch, minibatch_value, 1.0)
            return jnp.where(jnp.abs(w).max() > 100, region_value, loss)

        def faulty(rate, fault):
            return optimizers.faulty(rate, at=fault[0], fault=fault[1], value=fault[2])

        guard = GUARDS[name](faulty(0.3, learned_fault), faulty(0.1, fallback_fault))
        return runs.play(guard, objective, START, CYCLES)

    return jax.jit(play)


@pytest.mark.parametrize("name", GUARDS)
@given(
    learned_fault=faults,
    fallback_fault=faults,
    minibatch=st.one_of(st.integers(0, CYCLES * (NT + NC) - 1), st.just(NEVER)),
    minibatch_value=values,
    region_value=values,
)
def test_x_is_finite_for_ever(
    name, learned_fault, fallback_fault, minibatch, minibatch_value, region_value
) -> None:
    states, decisions = player(name)(
        learned_fault, fallback_fault, minibatch, minibatch_value, region_value
    )
    assert np.isfinite(states.params).all()
    inner = states.inner
    lanes = (inner.relay.z, inner.relay.s) if name in RELAYS else (inner.learned, inner.fallback)
    for leaf in jax.tree.leaves(lanes):
        assert np.isfinite(leaf).all()  # what is gone on from is sound too
    if name not in LOSS_GUARDS:
        return
    before = np.concatenate([START[None], states.params[:-1]])
    changed = (before != states.params).any(axis=1)
    used, winner = np.asarray(decisions.used_learned), np.asarray(decisions.winner)
    np.testing.assert_array_equal(winner == 0, used.all(axis=1))
    assert not changed[winner == -1].any()
    assert np.isfinite(decisions.learned_loss[winner == 0]).all()
    assert np.isfinite(decisions.fallback_loss[winner == 1]).all()
    assert (np.diff([excess(w) for w in (START, *states.params)]) <= 0).all()


def play(name: str, learned_fault=(NEVER, 0, 0.0), fallback_fault=(NEVER, 0, 0.0), **bad):
    bad = {"minibatch": NEVER, "minibatch_value": 1.0, "region_value": 0.0} | bad
    return player(name)(learned_fault, fallback_fault, *bad.values())


@pytest.mark.parametrize("name", LOSS_GUARDS)
@pytest.mark.parametrize("fault", range(2))
def test_a_bad_learned_branch_loses(name, fault) -> None:
    """In cycle 2 (steps 4 and 5) the fallback is kept, though NaN compares with nothing."""
    _, decisions = play(name, learned_fault=(5, fault, np.nan), region_value=np.nan)
    np.testing.assert_array_equal(decisions.winner[:4], [0, 0, 1, 0])


@pytest.mark.parametrize("name", LOSS_GUARDS)
@pytest.mark.parametrize("region_value", [np.nan, -np.inf])
def test_a_bad_fallback_branch_loses(name, region_value) -> None:
    """Even to a learned branch that is worse than where it began, and to a loss of -inf."""
    _, decisions = play(name, fallback_fault=(4, 1, 0.0), region_value=region_value)
    assert decisions.winner[2] == 0


@pytest.mark.parametrize("name", LOSS_GUARDS)
@pytest.mark.parametrize("minibatch", [4, 5, 6, 7])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_x_stays_if_neither_branch_is_finite(name, minibatch, value) -> None:
    """Minibatches 4 and 5 are cycle 1's to train on, 6 and 7 to check."""
    states, decisions = play(name, minibatch=minibatch, minibatch_value=value)
    np.testing.assert_array_equal(decisions.winner[:3], [0, -1, 0])
    np.testing.assert_array_equal(states.params[0], states.params[1])
    assert not decisions.used_learned[1].any()
    assert np.isinf(decisions.losses[1]).all()  # not those of steps that were undone
    assert states.steps[1] == 2 * NT  # and time goes on
    assert states.minibatches[1] == 2 * (NT + NC)


@pytest.mark.parametrize("name", RELAYS)
@pytest.mark.parametrize("fault", range(len(optimizers.FAULTS)))
@pytest.mark.parametrize("at", [3, 15])
def test_a_relay_gets_over_a_learned_lane_that_breaks_once(name, fault, at) -> None:
    """At its fourth step, on trial; or at its sixteenth, when it leads: its lead is over.

    At the third or fifteenth in its memory, which would be made anew at the end of a cycle.
    """
    leads, at = at > 3, at - (optimizers.FAULTS[fault] == "state")
    states, decisions = play(name, learned_fault=(at, fault, np.nan), region_value=np.nan)
    _, right = play(name)
    assert (right.winner[4:] == 0).all() and (right.winner[:4] == 2).all()
    cycle = (at + (fault > 0)) // NT  # a bad memory, or a leap, shows in the next step
    winner = np.asarray(decisions.winner)
    np.testing.assert_array_equal(winner[:cycle], right.winner[:cycle])
    assert (winner[cycle:] == (1 if leads and name == "recommended" else 2)).all()
    assert excess(states.params[cycle]) < excess(START)
    assert excess(states.params[-1]) < excess(START) / 100


@pytest.mark.parametrize("name", RELAYS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_lost_minibatch_costs_a_relay_one_step(name, value) -> None:
    """Of the cycle that has two; it is told, and whoever leads leads on."""
    right, _ = play(name)
    states, decisions = play(name, minibatch=15, minibatch_value=value)
    assert (decisions.winner[4:] == 0).all()
    assert np.flatnonzero(~np.isfinite(decisions.losses)).tolist() == [15]
    ends = [excess(w) for w in (right.params[-2], states.params[-1], right.params[-1])]
    assert ends[0] > ends[1] > ends[2]
    for minibatch in (1, 5):
        states, decisions = play(name, minibatch=minibatch, minibatch_value=value)
        assert excess(states.params[-1]) < excess(START) / 100


@pytest.mark.parametrize("name", RELAYS)
def test_a_relay_goes_on_from_the_learned_lane_where_the_fallback_breaks(name) -> None:
    """In a trial, at the end of it: whoever is finite takes over."""
    fallback = optax.sgd(lambda t: jnp.where(t < 4, 0.1, jnp.nan))
    guard = GUARDS[name](optax.sgd(0.3), fallback)
    states, decisions = runs.play(guard, lambda w, i: excess(w), START, CYCLES)
    assert (decisions.winner[:4] == 2).all() and (decisions.winner[4:] == 0).all()
    np.testing.assert_array_equal(states.params[3], states.params[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("minibatch", [0, 3])
def test_the_residual_guard_gets_over_a_bad_minibatch(minibatch, value) -> None:
    """The first among them, whose residual is no bound: the next that is finite becomes mu_1."""
    states, decisions = play("residual", minibatch=minibatch, minibatch_value=value)
    assert not decisions.used_learned.reshape(-1)[minibatch]
    assert decisions.used_learned[3:].all()
    hostile = lossguard.residual_guard(optimizers.constant(100.0), optax.sgd(0.1), nt=10)
    with jax.disable_jit():
        _, decision = hostile.step(
            hostile.init(START), lambda w, i: excess(w) * jnp.where(i == minibatch, value, 1.0)
        )
    assert not decision.used_learned[minibatch:].any()
    assert np.isfinite(states.params).all()


@pytest.mark.parametrize("fallback", [optax.linear_schedule(0.0, 0.1, 50), 0.0])
def test_the_residual_guard_waits_for_a_fallback_that_moves(fallback) -> None:
    """A warm-up from 0 begins with a residual of 0, which is no bound."""
    guard = lossguard.residual_guard(optax.sgd(0.3), optax.sgd(fallback))
    _, decisions = lossguard.rollout(
        guard, guard.init(jnp.ones(2)), lambda w, i: jnp.sum(w**2), cycles=3
    )
    assert not decisions.used_learned[0, 0]
    assert decisions.used_learned.any() == (fallback != 0.0)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", [*RELAYS, "best_of", "given"])
def test_a_gradient_that_is_not_finite_is_one_of_0(name) -> None:
    """Of steps of w <- 0.8 w, whoever takes them, one is lost: the loss there is finite."""

    def objective(w, i):
        fine = 1.0 - (i == 3)
        return jnp.sum(w**2) + jnp.sqrt(fine + 0 * w.sum()) - fine

    learned, fallback = optax.sgd(0.1), optax.sgd(0.1)
    if name in RELAYS:
        guard = RELAYS[name](learned, fallback)
    else:
        guard = lossguard.best_of([lossguard.unguarded(learned, nt=NT)])
    state = guard.init(START)
    for k in range(2):
        numbers = jnp.arange(k * NT, (k + 1) * NT)
        state, _ = guard.step(state, objective, numbers if name == "given" else None)
    np.testing.assert_allclose(state.params, START * 0.8 ** (2 * NT - 1), rtol=1e-6)


def test_states_that_begin_infinite_are_sound() -> None:
    """Reduce-on-plateau begins with a best value of infinity."""
    learned = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=2))
    guard = lossguard.loss_guard(learned, optax.sgd(0.01), nt=2, nc=1)
    state = guard.init(START)
    for _ in range(3):
        state, _ = guard.step(state, lambda w, i: excess(w))
    assert state.inner.learned[1].best_value < jnp.inf  # it was not made again


@pytest.mark.usefixtures("eager")
def test_a_state_that_is_made_anew_keeps_its_schedule() -> None:
    """On F(w) = w a step of SGD is its rate: 8, 4, 2, 1, ... whatever became of the momentum."""
    spoilt = optax.chain(
        optimizers.faulty(-1.0, at=1, fault="state", value=np.nan),
        optax.scale_by_learning_rate(lambda k: 8.0 * 0.5**k),
    )
    guard = lossguard.loss_guard(spoilt, optimizers.constant(1.0), nt=1, nc=1)
    state = guard.init(jnp.array(0.0))
    moves = []
    for _ in range(4):
        before = state.params
        state, _ = guard.step(state, lambda w, i: w)
        moves.append(float(before - state.params))
    assert moves == [8.0, 4.0, 2.0, 1.0]


def test_the_residual_guard_in_low_precision() -> None:
    """Norms don't underflow, and a step that is lost in rounding is no reason to accept."""
    up = optimizers.constant(0.5)

    def objective(w, i):
        return 0.5e-4 * jnp.sum(w.astype(jnp.float32) ** 2)

    for residual, dtype, mu in (("gradient", jnp.float16, 8e-4), ("step", jnp.bfloat16, 0.0)):
        guard = lossguard.residual_guard(up, optax.sgd(1.0), residual=residual, nt=6)
        state, decision = guard.step(guard.init(jnp.ones(64, dtype)), objective)
        assert not decision.used_learned.any()
        np.testing.assert_allclose(jax.tree.leaves(state.inner.memory)[0], mu, rtol=0.05)


MASKED = (
    LOSS_GUARDS
    | RELAYS
    | {
        "best of": lambda y, z: lossguard.best_of(
            [lossguard.unguarded(one, nt=NT, trusted=one is z) for one in (y, z)]
        )
    }
)


@pytest.mark.parametrize("name", MASKED)
def test_a_parameter_may_be_infinite_from_the_start(name) -> None:
    """As a mask is; others have to stay finite."""
    start, cycles = {"w": jnp.array([2.0, 1.0]), "mask": jnp.array([0.0, -jnp.inf])}, 8

    def objective(params, i):
        return jnp.sum(params["w"] ** 2) + jax.nn.softmax(params["w"] + params["mask"])[0]

    for learned, rate in ((optax.sgd(0.2), 0.2), (optax.sgd(1e38), 0.1)):
        guard = MASKED[name](learned, optax.sgd(0.1))
        state, decisions = lossguard.rollout(guard, guard.init(start), objective, cycles=cycles)
        lost = 2 if name in RELAYS else 1
        assert decisions.winner[-1] == (0 if rate == 0.2 else lost)
        expected = (1 - 2 * rate) ** (cycles * NT) * start["w"]
        np.testing.assert_allclose(state.params["w"], expected, rtol=1e-5)
        assert state.params["mask"].tolist() == [0.0, -np.inf]


def test_a_mask_does_not_stop_algorithm_1() -> None:
    params = {"w": jnp.ones(1), "mask": jnp.array([-jnp.inf])}
    optimizer = lossguard.guarded(optax.sgd(0.2), optax.sgd(0.1))

    def loss(params):
        return jnp.sum(params["w"] ** 2) + jnp.exp(params["mask"][0])

    updates, _ = optimizer.update(
        jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss
    )
    assert optax.apply_updates(params, updates)["w"] == pytest.approx(0.6)
