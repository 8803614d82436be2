"""Minibatches on which no lane has a finite loss: they are passed over, and decide nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import Weights

import lossguard
from lossguard.guards import trial as trials

STAYS = optax.sgd(0.0)


def goes_to_one() -> optax.GradientTransformation:
    return optax.stateless(lambda gradients, params: 1 - params)


def lost_in(i, numbers) -> jax.Array:
    """inf, added to a loss, on some of the minibatches."""
    return jnp.where(jnp.isin(i, jnp.array(numbers)), jnp.inf, 0.0)


def told(guard, objective, start, cycles):
    """What is reported, without what is lost; and the end."""
    state, decisions = lossguard.rollout(guard, guard.init(start), objective, cycles=cycles)
    losses = np.asarray(decisions.losses)
    return np.where(np.isfinite(losses), losses, 0).sum(axis=1).cumsum(), state, decisions


@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf])
def test_in_a_trial_they_cancel(lost) -> None:
    """A loss that only one lane has lost decides nothing, all of a cycle decide."""
    y, z = jnp.array(np.random.default_rng(0).standard_normal((2, 10)), jnp.float32)

    def played(y, z):
        trial = trials.begin(jnp.int32(1), jnp.float32(jnp.inf))
        return trials.play(trial, y, z)

    at = jnp.arange(10) == 7
    both, *_ = played(jnp.where(at, lost, y), jnp.where(at, jnp.nan, z))
    level, *_ = played(jnp.where(at, z, y), z)
    assert both.total == level.total and both.size == level.size
    for of_y, of_z in ((jnp.where(at, lost, y), z), (z - 1, jnp.where(at, lost, z))):
        trial, won, _ = played(of_y, of_z)
        mean, error = trials.difference(trial)
        np.testing.assert_allclose(jnp.abs(mean), error, rtol=1e-3)
        assert not won
    _, won, _ = played(y, jnp.full(10, lost))
    assert won
    _, _, lost_it = played(jnp.full(10, lost), z)
    assert lost_it


@pytest.mark.parametrize(("nt", "numbers"), [(10, range(50, 60)), (1, [57])])
def test_hedged_keeps_its_promise_over_a_cycle_that_is_lost(nt, numbers) -> None:
    """x is better for a while, then level with s, then worse."""
    leaps = optax.stateless(
        lambda gradients, params: jnp.where(params < 0.5, 1.0, 0.0) + 0 * params
    )

    def objective(w, i):
        better, worse = jnp.where(i < 40, -w, 0), jnp.where(i >= 61, w, 0)
        return 5 + better + worse + lost_in(i, [*numbers])

    hedged, start = lossguard.hedged(leaps, STAYS, nt=nt), jnp.float32(0.0)
    reported, state, _ = told(hedged, objective, start, 120 // nt)
    alone, _, _ = told(lossguard.unguarded(STAYS, nt=nt), objective, start, 120 // nt)
    assert (reported <= alone + 1e-3).all() and reported[40 // nt] < alone[40 // nt]
    assert state.inner.relay.s.at.params == 0


def test_what_is_lost_pays_for_no_later_loss() -> None:
    gain = jnp.zeros(50).at[29].set(-1.0).at[30:40].set(0.6)

    def objective(w, i):
        early = jnp.where(i < 10, (w - 1) ** 2, gain[i] * w)
        return 5 + early + lost_in(i, range(20, 29))

    start = jnp.float32(0.0)
    reported, _, _ = told(lossguard.hedged(goes_to_one(), STAYS), objective, start, 5)
    alone, _, _ = told(lossguard.unguarded(STAYS), objective, start, 5)
    assert (reported <= alone + 1e-3).all()


def test_with_cycles_of_one_step_a_trial_goes_on_after_one() -> None:
    def objective(w, i):
        return jnp.sum((w - 1) ** 2) + lost_in(i, [4])

    guard = lossguard.recommended(optax.sgd(0.4), optax.sgd(1e-4), nt=1)
    _, _, decisions = told(guard, objective, jnp.zeros(2), 14)
    assert decisions.winner[-1] == 0


def test_a_lead_without_a_finite_loss_for_ten_steps_is_over() -> None:
    """Whether the data or the learned optimizer is to blame can't be told."""
    learned = optax.sgd(lambda t: jnp.where(t == 39, -1e6, 0.05))

    def objective(w, i):
        return jnp.where(jnp.abs(w).max() > 100, jnp.nan, jnp.sum(w**2))

    guard = lossguard.recommended(learned, optax.sgd(1e-4))
    _, state, decisions = told(guard, objective, jnp.ones(2), 6)
    assert decisions.winner[:5].tolist() == [0, 0, 0, 0, 1]
    assert objective(state.params, 0) < 2


def test_x_goes_back_to_s_where_only_s_has_a_finite_loss() -> None:
    """The learned optimizer leads to where the curve is too steep for the fallback."""

    def objective(w, i):
        u, v = w
        loss = 3 - 2 * jnp.minimum(u, 1.0) + (1 + 99 * jnp.clip(u, 0, 1)) * v**2 / 2
        return jnp.where(jnp.abs(v) > 1e3, jnp.nan, loss)

    learned = optax.stateless(lambda _, w: (jnp.where(w[0] < 1, 0.05, 0.0), 0 * w[1]))
    fallback = optax.stateless(lambda g, w: (jnp.float32(0.001), -0.12 * g[1]))
    guard = lossguard.recommended(learned, fallback)
    _, state, decisions = told(guard, objective, (jnp.float32(0.0), jnp.float32(0.001)), 60)
    broke = np.flatnonzero(np.isnan(decisions.losses).any(axis=1))[0]
    assert decisions.winner[:broke].tolist().count(0) > 0
    assert 2 in decisions.winner[broke + 1 : broke + 6].tolist()
    assert jnp.isfinite(objective(state.params, 0))


@pytest.mark.parametrize("make", [lossguard.recommended, lossguard.hedged])
def test_the_price_is_bounded_where_all_are_lost(make) -> None:
    def objective(w, i):
        return jnp.sum(w**2) + jnp.where(i >= 5, jnp.inf, 0.0)

    _, state, decisions = told(make(optax.sgd(0.2), STAYS, nt=1), objective, jnp.ones(2), 1_000)
    assert decisions.gradients.sum() <= 1.05 * 1_000 + np.sqrt(1_000) + 30
    assert np.isfinite(state.params).all()


def test_one_that_is_lost_on_the_path_of_s_is_no_progress_of_it() -> None:
    def objective(w, i):
        return jnp.sum((w - 1) ** 2) + lost_in(i, range(20, 30))

    _, state, _ = told(lossguard.recommended(STAYS, optax.sgd(0.01)), objective, jnp.zeros(2), 5)
    assert np.isfinite(state.inner.progress.recent)


def test_one_loss_of_x_alone_is_no_reason_to_go_back_to_s() -> None:
    """x is at 1, s at 0 or so."""

    def objective(w, i):
        return 1 + (w - 1) ** 2 + jnp.where((w > 0.5) & (i == 151), jnp.inf, 0.0)

    leaps = optax.stateless(lambda gradients, w: jnp.where(w < 0.5, 1 - w, 0.0))
    guard = lossguard.recommended(leaps, optax.sgd(1e-6), share=0.5)
    _, state, decisions = told(guard, objective, jnp.float32(0.0), 20)
    assert not np.isfinite(decisions.losses[15]).all() and decisions.gradients[15] > 10
    assert state.params > 0.9 and 2 not in decisions.winner[10:].tolist()


@pytest.mark.parametrize("share", [None, 0.05])
@pytest.mark.parametrize("held_out", [False, True])
def test_best_of_decides_by_the_others(share, held_out) -> None:
    """One of three minibatches is lost."""

    def objective(w, i):
        return jnp.sum((w - 1) ** 2) + jnp.where(i % 3 == 1, jnp.nan, 0.0)

    check = {"check": objective, "nc": 3} if held_out else {}
    members = [lossguard.unguarded(optax.sgd(rate)) for rate in (1e-6, 0.1)]
    guard = lossguard.best_of(members, share=share, **check)
    _, state, decisions = told(guard, objective, jnp.zeros(2), 30)
    assert decisions.winner[-1] == 1 and np.isfinite(state.inner.records).all()
    np.testing.assert_allclose(state.params, 1, atol=1e-3)


def test_parameters_of_ones_own_class_are_stepped_over_a_gradient_that_is_not_finite() -> None:
    def objective(params, i):
        return jnp.sum((params.w - 1) ** 2) * jnp.where(i == 3, jnp.nan, 1.0)

    guard = lossguard.recommended(optax.sgd(0.3), optax.sgd(0.1))
    _, state, _ = told(guard, objective, Weights(jnp.zeros(2)), 5)
    np.testing.assert_allclose(state.params.w, 1, atol=1e-3)
