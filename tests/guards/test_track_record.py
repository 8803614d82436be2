"""Going back to the fallback's own path by a record of training losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lossguard.guards.track_record import Excess, TrackRecord, track_record
from problems import CONVEX, noisy, valleys
from runs import play
from scipy import stats

import lossguard

NT, NC, CYCLES, DECAY, SHARE = 4, 3, 80, 0.8, 0.3
ZERO = jnp.float32(0)
NONE = Excess(ZERO, ZERO, ZERO, jnp.int32(0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("problem", ["noise", "valleys"])
@pytest.mark.parametrize(
    ("trusted", "options"),
    [
        (optax.sgd(0.05), {}),
        (optax.adam(0.1), {"loser": "reset", "probing": lossguard.backoff(patience=3, most=8)}),
        (optax.sgd(0.05, momentum=0.5), {"windows": lossguard.adaptive(most=2)}),
    ],
    ids=["sgd", "adam, backoff", "momentum, adaptive"],
)
def test_the_curve_is_not_above_the_fallbacks(problem, trusted, options) -> None:
    """theory.md, section 5: with any memory not shorter than the record's, and with none at all.

    In every run and at every cycle, whatever the learned optimizer, the noise and the landscape.
    Nor is it above x's own curve, whose excess is R.
    """
    noise, minibatches = problem == "noise", 2 * CYCLES * (NT + NC)
    f = noisy(CONVEX["quadratic"](), jax.random.key(1), 2.0, minibatches) if noise else valleys
    alone = lossguard.unguarded(trusted, nt=NT)

    def one(which):
        guard = lossguard.loss_guard(
            optimizers.hostile(which, 0.15),
            trusted,
            nt=NT,
            nc=NC,
            hedge=track_record(decay=DECAY, share=SHARE),
            **options,
        )

        def step(states, _):
            state, single = states
            i = state.minibatches
            state, decision = guard.step(state, f)
            half, first = alone.step(single._replace(minibatches=i), f)
            full, second = alone.step(half, f)
            longer = decision.steps > NT  # windows are nt or twice that
            single = jax.tree.map(lambda a, b: jnp.where(longer, a, b), full, half)
            own = first.losses.sum() + jnp.where(longer, second.losses.sum(), 0)
            apart = jnp.abs(state.inner.lanes.own.params - single.params).max()
            above = jnp.nansum(decision.losses) - own
            inner = state.inner
            beside = (decision.winner == 2) & ~inner.lanes.on_own
            return (state, single), (above, *inner.excess, inner.lanes.on_own, apart, beside)

        start = 2.0 + 0.1 * jnp.arange(6.0)
        return jax.lax.scan(step, (guard.init(start), alone.init(start)), length=CYCLES)[1]

    above, total, worst, recent, _, on_own, apart, beside = map(
        np.asarray, jax.jit(jax.vmap(one))(jnp.arange(len(optimizers.HOSTILE)))
    )
    assert (apart < 1e-9).all()  # s is the fallback alone
    assert (total <= worst).all()
    assert (total[on_own] == 0).all()
    assert (worst[on_own] == 0).all()
    assert (recent[on_own] == 0).all()
    for decay in (DECAY, 0.95, 1.0):
        regret = np.zeros(len(above))
        for cycle in range(CYCLES):
            regret = decay * regret + above[:, cycle]
            best = np.minimum(recent[:, cycle], 0) if decay == DECAY else 0
            assert (regret <= best + 1e-9).all()
    turns = optimizers.HOSTILE.index("turns")
    assert np.cumsum(above, axis=1)[turns].min() < -0.1  # there was something to gain
    assert not on_own[turns].all()
    if noise:
        assert (~on_own[:, :-1] & on_own[:, 1:]).any()  # x went back
        assert beside.any()  # s was given out while x went on


@given(
    decay=st.floats(0.0, 0.99),
    share=st.floats(0.0, 0.99),
    gaps=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40),
    on_own=st.booleans(),
)
def test_the_rule_is_numpys(decay, share, gaps, on_own) -> None:
    """D and R are weighted sums, W the largest term of D, however gaps are split into curves."""
    record, excess, terms = TrackRecord(decay, share), NONE, np.zeros(0)
    for k, gap in enumerate(gaps):
        kept, own = jnp.array([gap, 1.0, np.nan]), jnp.array([0.5, 0.5, np.nan])
        excess, back = record.update(excess, kept, own, 2, jnp.array(on_own))
        memory = max(1 / (1 - decay), share * (k + 1))  # in cycles
        terms = np.append((1 - 1 / memory) * terms, gap)
        error = 1e-5 * (np.abs(terms).sum() + 1)
        np.testing.assert_allclose(excess.total, sum(terms), atol=error)
        np.testing.assert_allclose(excess.worst, max([0, *terms]), atol=error)
        recent = sum(decay**age * d for age, d in enumerate(reversed(gaps[: k + 1])))
        np.testing.assert_allclose(excess.recent, recent, atol=error)
        assert bool(back) == bool(excess.total > (0 if on_own else excess.worst))


def cycles_until_back(gaps) -> int | None:
    record, excess = TrackRecord(0.9, 0.0), NONE
    for cycle, gap in enumerate(gaps, 1):
        args = excess, jnp.array([gap]), jnp.array([0.0]), 1, jnp.array(False)
        excess, back = record.update(*args)
        if back:
            return cycle
    return None


def test_a_lead_is_forgotten() -> None:
    """A lead of 1, and then 0.001 worse in each cycle: back after as many cycles as it says.

    decay^k lead < gap (decay - decay^k) / (1 - decay), the worst term being the last one.
    """
    lead, gap = 1.0, 1e-3
    expected = np.ceil(np.log(1 / 0.9 + lead * 0.1 / gap / 0.9) / np.log(1 / 0.9))
    assert cycles_until_back([-lead] + [gap] * 200) == 1 + expected


@pytest.mark.parametrize(("ahead", "gap"), [(500, 0.5), (2_000, 3.0), (2_000, 0.1)])
def test_a_long_lead_takes_long_to_forget(ahead, gap) -> None:
    """theory.md, section 5: ahead by 1 a cycle for A cycles, then behind by g a cycle.

    D = (1 - 10/a) D - 1 has the solution D = -a / 11. The memory is A / 10 then, and a little
    more while it lasts.
    """
    record, share = TrackRecord(0.7, 0.1), 0.1
    gaps = jnp.array([-1.0] * ahead + [gap] * ahead)

    def step(excess, gap):
        excess, back = record.update(excess, gap[None], jnp.zeros(1), 1, jnp.array(False))
        return excess, (excess.total, back)

    totals, back = jax.lax.scan(step, NONE, gaps)[1]
    assert totals[ahead - 1] == pytest.approx(-ahead / 11, rel=1e-2)
    lasted = int(jnp.argmax(back)) + 1 - ahead
    expected = share * ahead * np.log(1 + 10 / 11 / gap)
    assert expected <= lasted <= (1 + expected / ahead) * expected + 2


def test_a_few_bad_cycles_cost_no_long_lead() -> None:
    """Two are enough to go back early, or without a share."""

    def goes_back(share: float, ahead: int) -> bool:
        record, excess = TrackRecord(0.7, share), NONE
        for gap in [-1.0] * ahead + [3.0, 3.0]:
            args = excess, jnp.array([gap]), jnp.zeros(1), 1, jnp.array(False)
            excess, back = record.update(*args)
        return bool(back)

    assert goes_back(share=0.1, ahead=20)
    assert goes_back(share=0.0, ahead=200)
    assert not goes_back(share=0.1, ahead=200)


def test_one_bad_cycle_is_forgiven() -> None:
    """However bad, and whenever; two of them are not, nor three in nine."""
    assert cycles_until_back([-1e-3] * 5 + [1e6] + [-1e-3] * 200) is None
    assert cycles_until_back([1e6] + [0.0] * 200) is None
    assert cycles_until_back([-1e-3] * 5 + [1e6, 1e6]) == 7
    assert cycles_until_back([-1.0, -1.0, 9.0] * 3) == 6


@pytest.mark.parametrize(
    ("kept", "own", "back"),
    [
        (1.0, 2.0, False),
        (2.0, 1.0, True),
        (1.0, 1.0, False),
        (np.inf, 1.0, True),
        (np.nan, 1.0, True),
        (-np.inf, 1.0, True),
        (1.0, np.inf, False),
        (1.0, np.nan, False),
        (np.nan, np.nan, False),
    ],
)
def test_what_is_not_finite(kept, own, back) -> None:
    args = jnp.array([kept]), jnp.array([own]), 1
    for excess in (NONE, Excess(jnp.float32(-9), jnp.float32(0.5), ZERO, jnp.int32(3))):
        _, goes = TrackRecord(0.5, 0.1).update(excess, *args, jnp.array(True))
        if excess is NONE or not np.isfinite(kept):
            assert bool(goes) == back
        _, goes = TrackRecord(0.5, 0.1).update(excess, *args, jnp.array(False))
        assert bool(goes) == (back and not np.isfinite(kept))  # one cycle alone is not enough


def once(to: list[float]) -> optax.GradientTransformation:
    """Leaps to a point in its first step, and stays where it is from then on."""

    def update(updates, state, params=None):
        return jnp.where(state == 0, jnp.array(to) - params, 0.0), state + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def slope(w: jax.Array, i: jax.Array | int) -> jax.Array:
    """Falls along v for ever where u = 0, and is flat where u = 1."""
    return jnp.where(w[0] > 0.5, -5.0, -w[1])


def test_a_lead_outlives_a_check_that_is_lost_on_all() -> None:
    """x stays where it is, and is compared by what z's training losses say."""

    def objective(w, i):
        return jnp.where(i == -18, jnp.nan, jnp.sum(w**2))

    guard = lossguard.loss_guard(
        optax.sgd(0.2), optax.sgd(1e-4), nt=2, nc=4, checks="apart", hedge=track_record(decay=0.7)
    )
    step, state = jax.jit(lambda s: guard.step(s, objective)), guard.init(jnp.ones(2))
    for cycle in range(8):
        before = state.params
        state, decision = step(state)
        assert decision.winner == (-1 if cycle == 4 else 0)
        assert (state.params <= before).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("patience", [None, 2])
def test_x_goes_back_while_the_learned_lane_waits(patience) -> None:
    """x leaps to -5 and stays there; s falls by 0.4 a cycle, and costs no check minibatches."""
    guard = lossguard.loss_guard(
        once([1.0, 0.0]),
        optax.sgd(0.1),
        nt=4,
        nc=3,
        hedge=track_record(decay=0.5, share=0),
        probing=(
            lossguard.always()
            if patience is None
            else lossguard.backoff(patience=patience, most=64)
        ),
    )
    step = jax.jit(lambda state: guard.step(state, slope))
    state, excess, worst = guard.init(jnp.zeros(2)), 0.0, 0.0
    for cycle in range(60):
        before = state
        state, decision = step(state)
        probed = patience is None or int(before.inner.probing.left) == 0
        lanes = (2 if probed else 1) + (not before.inner.lanes.on_own)
        assert decision.gradients == 4 * lanes
        assert decision.forwards == 3 * 2 * probed
        own = [-0.1 * (4 * cycle + t) for t in range(4)]
        kept = own if before.inner.lanes.on_own else [-5.0] * 4
        if cycle == 0:
            kept = [0.0, -5.0, -5.0, -5.0]
        d = sum(kept) - sum(own)
        excess, worst = 0.5 * excess + d, max(0.5 * worst, d)
        if cycle == 0:
            assert decision.winner == 0
        if excess > worst:
            assert decision.winner == 2
            np.testing.assert_array_equal(state.params, state.inner.lanes.own.params)
            break
        assert decision.winner == (2 if excess > 0 else 0 if cycle == 0 else 1)
        expected = excess, worst, excess, cycle + 1  # without a share R is D
        np.testing.assert_allclose(state.inner.excess, expected, rtol=1e-5)
    assert 10 < cycle < 50
    if patience is not None:
        assert not probed


def test_leaving_takes_the_training_losses_too() -> None:
    """A lane that climbs over a hill wins the check, but was worse on the way: F = 0, 10, -5."""

    def hill(w, i):
        return jnp.where(w < 0.5, 0.0, jnp.where(w < 1.5, 10.0, -5.0))

    for hedge, winner in ((True, 0), (track_record(), 2)):
        guard = lossguard.loss_guard(stride(), optax.sgd(0.0), nt=2, nc=1, hedge=hedge)
        _, decision = guard.step(guard.init(jnp.array(0.0)), hill)
        assert (decision.learned_loss, decision.fallback_loss) == (-5, 0)
        assert decision.winner == winner


def test_a_lane_that_the_record_keeps_off_has_lost_for_probing() -> None:
    """It wins the check of every probe, and is worse on the way there."""

    def objective(w, i):
        return jnp.where(i < 0, -w.sum(), w.sum())  # check minibatches are numbered below 0

    guard = lossguard.loss_guard(
        stride(),
        optax.sgd(0.0),
        nt=2,
        nc=1,
        checks="apart",
        hedge=track_record(),
        probing=lossguard.backoff(patience=1, most=2),
    )
    _, decisions = play(guard, objective, jnp.zeros(()), 6)
    probed = np.array([True, False, True, False, False, True])
    np.testing.assert_array_equal(decisions.learned_updates, 2 * probed)
    np.testing.assert_array_equal(decisions.winner, 2)
    assert (decisions.learned_loss < decisions.fallback_loss)[probed].all()


def stride() -> optax.GradientTransformation:
    """w + 1."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda updates, state, params=None: (1.0, state)
    )


def test_memory_and_types() -> None:
    """The excess has the losses' type, and a second cycle compiles nothing."""
    guard = lossguard.loss_guard(
        optax.sgd(0.1), optax.sgd(0.1), nt=2, nc=1, hedge=track_record(decay=0.9)
    )
    step = jax.jit(lambda state: guard.step(state, lambda w, i: jnp.sum(w**2)))
    state = guard.init(jnp.ones(2))
    for _ in range(3):
        state, _ = step(state)
    assert step._cache_size() == 1
    assert state.inner.excess.total.dtype == jnp.float32


@pytest.mark.parametrize("decay", [1.0, 0.0, -0.1, float("nan"), 2])
def test_errors(decay) -> None:
    with pytest.raises(ValueError, match="decay must be above 0 and below 1, got"):
        track_record(decay=decay)
    if decay != 0:
        with pytest.raises(ValueError, match="share must be at least 0 and below 1, got"):
            track_record(share=decay)


@pytest.mark.parametrize(("lead", "kept"), [(0.009, True), (0.008, False)])
def test_one_bad_cycle_in_25_is_forgiven_for_ever(lead, kept) -> None:
    """Each is worse by 1, and x is ahead by a lead in the 24 between: at the most 0.03 a cycle."""
    record, excess, d = TrackRecord(0.9, 0.0), NONE, [1.0, *24 * [-lead]]
    returns = []
    for cycle in range(8 * 25):
        excess, back = record.update(
            excess, jnp.array([d[cycle % 25]]), jnp.zeros(1), 1, jnp.array(False)
        )
        returns.append(bool(back))
    assert any(returns) != kept
    assert sum(d) / 25 == pytest.approx(0.03, abs=0.003)


@pytest.mark.parametrize(("rho", "g", "worth"), [(0.9, 0.3, 19), (0.7, 0.5, 17 / 3)])
def test_a_record_is_worth_19_cycles(rho, g, worth) -> None:
    """P(D > 0) = N(-(g / s) sqrt((1 + rho) / (1 - rho))) where d are normal."""
    cycles = 200_000
    d = np.random.default_rng(0).normal(-g, 1, cycles).astype(np.float32)
    record, on_own = TrackRecord(rho, 0.0), jnp.array(False)

    def step(excess, d):
        excess, _ = record.update(excess, d[None], jnp.zeros(1), 1, on_own)
        return excess, excess.total > 0

    ahead = jax.jit(lambda d: jax.lax.scan(step, NONE, d)[1])(d).mean()
    assert (1 + rho) / (1 - rho) == pytest.approx(worth)
    assert float(ahead) == pytest.approx(stats.norm.sf(g * worth**0.5), abs=0.006)


def test_on_its_own_path_too_a_fallback_whose_check_is_not_finite_is_not_kept() -> None:
    guard = lossguard.loss_guard(
        optax.sgd(-0.1), optax.sgd(0.1), nt=2, nc=2, checks="apart", hedge=track_record()
    )

    def objective(w, i):
        return jnp.where((i < 0) & (w @ w < 1), jnp.nan, w @ w)

    _, decision = guard.step(guard.init(jnp.ones(1)), objective)
    assert not decision.finite_fallback and decision.winner == 0


def test_where_s_begins_again_so_does_the_record() -> None:
    fallback = optimizers.faulty(0.01, at=5, fault="parameters", value=np.inf)
    guard = lossguard.loss_guard(optax.sgd(0.3), fallback, nt=3, nc=2, hedge=track_record())
    states, decisions = play(guard, lambda w, i: w @ w, jnp.array([1.0, -2.0]), 4)
    np.testing.assert_array_equal(decisions.winner, 0)
    np.testing.assert_array_equal(states.inner.lanes.on_own, [False, True, False, False])
    np.testing.assert_array_equal(states.inner.excess.cycles, [1, 0, 1, 2])
    np.testing.assert_array_equal(states.inner.excess.total == 0, [False, True, False, False])


def test_where_x_stayed_the_losses_are_those_from_x() -> None:
    guard = lossguard.loss_guard(
        optax.sgd(0.2), optax.sgd(1e-3), nt=2, nc=2, checks="apart", hedge=track_record()
    )
    states, decisions = play(guard, lambda w, i: jnp.where(i == -3, jnp.nan, w @ w), jnp.ones(2), 2)
    np.testing.assert_array_equal(decisions.winner, [0, -1])
    x = states.params[0]
    np.testing.assert_allclose(decisions.losses[1, 0], x @ x, rtol=1e-6)
