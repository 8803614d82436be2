"""Going back to the best x when the losses since are higher than its own would have been."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from lossguard.guards.branch import Branch
from lossguard.guards.ratchet import Ratchet, RatchetState, init_ratchet, ratchet
from problems import CONVEX, noisy
from runs import play

import lossguard

NT, NC, CYCLES, EVERY, TOLERANCE = 3, 2, 60, 4, 0.05


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loser": "reset", "checks": "apart"},
        {"loser": "rollback"},
        {"hedge": True},
        {"hedge": "only"},
        {"hedge": lossguard.track_record(decay=0.95), "probing": lossguard.backoff(patience=2)},
    ],
    ids=["paper's", "reset, apart", "rollback", "hedged", "only", "record, backoff"],
)
def test_the_rule_in_plain_loops(options) -> None:
    """The guard without a ratchet, one cycle at a time, and x put back from outside."""
    f = noisy(CONVEX["quadratic"](), jax.random.key(1), 2.0, CYCLES * (NT + NC))
    learned = optimizers.hostile(1, 0.05)  # wanders
    trusted = optax.sgd(lossguard.paper_decay(0.2, tau=100.0), momentum=0.5)
    plain = lossguard.loss_guard(learned, trusted, nt=NT, nc=NC, **options)
    rule = ratchet(cycles=EVERY, tolerance=TOLERANCE)
    held = lossguard.loss_guard(learned, trusted, nt=NT, nc=NC, ratchet=rule, **options)
    step, plain_step = (jax.jit(lambda s, g=g: g.step(s, f)) for g in (held, plain))
    state, expected = held.init(jnp.full(6, 2.0)), plain.init(jnp.full(6, 2.0))
    best, sums = (expected.params, expected.inner.lanes.fallback), np.zeros(2)
    cycles, returns = 0, 0
    off_path, besides, record = 0, 0, options.get("hedge")
    for _ in range(CYCLES):
        i, was_on_own = expected.minibatches, bool(expected.inner.lanes.on_own)
        recent = float(expected.inner.excess.recent)
        expected, decision = plain_step(expected)
        cycles += 1
        # Of the plain guard's x, whose losses aren't told where s is given out.
        aside = expected.inner.x is not None and expected.inner.excess.recent > 0
        if not was_on_own:
            own = [f(best[0], i + t) for t in range(NT)]
            sums += [float(decision.losses.sum()), float(sum(own))]
            if aside:
                sums[0] += expected.inner.excess.recent - record.decay * recent
        spent = 0 if was_on_own else NT
        goes_back = False
        on_path = was_on_own or bool(expected.inner.lanes.on_own)
        if cycles == EVERY and not on_path and sums[0] > sums[1] + TOLERANCE * abs(sums[1]):
            goes_back, returns = True, returns + 1
            z_state = best[1]
            if z_state is not None:  # its schedule has gone on
                count = expected.inner.lanes.fallback[1].count
                z_state = (z_state[0], z_state[1]._replace(count=count))
            fresh = learned.init(best[0])
            lanes = expected.inner.lanes._replace(learned=(fresh,), fallback=z_state)
            x = None if expected.inner.x is None else best[0]
            inner = expected.inner._replace(lanes=lanes, x=x)
            expected = expected._replace(params=expected.params if aside else best[0], inner=inner)
        if on_path or (cycles == EVERY and sums[0] <= sums[1]):
            x = expected.params if expected.inner.x is None else expected.inner.x
            best = (x, expected.inner.lanes.fallback)
        if on_path or cycles == EVERY:
            cycles, sums = 0, np.zeros(2)

        state, told = step(state)
        np.testing.assert_allclose(state.params, expected.params, rtol=1e-9, atol=1e-12)
        assert told.winner == (-1 if goes_back and not aside else decision.winner)
        np.testing.assert_allclose(
            *(s.params if s.inner.x is None else s.inner.x for s in (state, expected)),
            rtol=1e-9,
            atol=1e-12,
        )
        assert told.forwards == decision.forwards + spent
        assert not (goes_back and told.used_learned.any())
        besides += aside
        np.testing.assert_allclose(told.losses, decision.losses, rtol=1e-9)
        off_path += not was_on_own
    assert off_path
    assert besides or not isinstance(record, lossguard.guards.track_record.TrackRecord)
    assert returns or "hedge" in options  # where x is seldom off the fallback's path for so long


def sums(kept: float, held: float, cycles: int = 100) -> RatchetState:
    branch = Branch(jnp.zeros(1), ())
    start = init_ratchet(branch, jnp.float32(0.0))
    return start._replace(cycles=cycles, kept=jnp.float32(kept), held=jnp.float32(held))


@pytest.mark.parametrize(
    ("kept", "held", "better", "back"),
    [
        (1.0, 1.0, True, False),
        (1.05, 1.0, False, False),
        (1.2, 1.0, False, True),
        (0.5, 1.0, True, False),
        (-1.05, -1.0, True, False),
        (-0.95, -1.0, False, False),
        (-0.8, -1.0, False, True),
        (np.nan, 1.0, False, True),
        (np.inf, 1.0, False, True),
        (1.0, np.inf, True, False),
    ],
)
def test_the_comparison(kept, held, better, back) -> None:
    rule = Ratchet(cycles=100, tolerance=0.1)
    assert tuple(map(bool, rule.compare(sums(kept, held)))) == (better, back)
    assert tuple(map(bool, rule.compare(sums(kept, held, cycles=99)))) == (False, False)


def climb(rate: float) -> optax.GradientTransformation:
    """Up by ``rate`` a step."""
    return optimizers.constant(rate)


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_a_slow_rise_that_no_check_sees(tolerance) -> None:
    """Checks are for climbing, training losses are w: without the ratchet x rises for ever."""

    def objective(w, i):
        return jnp.where(i < 0, -w[0], w[0])  # check minibatches are numbered below 0

    options = {"nt": 2, "nc": 1, "checks": "apart"}
    guards = [
        lossguard.loss_guard(climb(0.01), optax.sgd(0.0), **options),
        lossguard.loss_guard(
            climb(0.01), optax.sgd(0.0), ratchet=ratchet(cycles=5, tolerance=tolerance), **options
        ),
    ]
    ends = []
    for guard in guards:
        states, decisions = play(guard, objective, jnp.ones(1), 500)
        ends.append(float(states.params[-1, 0]))
        highest = float(decisions.losses.max())
    assert ends[0] == pytest.approx(1 + 500 * 2 * 0.01, rel=1e-4)
    # At most above by the tolerance on the mean of five cycles, and by what those five rise.
    assert ends[1] <= highest <= 1 + tolerance + 5 * 2 * 0.01 + 1e-4
    assert highest > 1 + tolerance


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_minibatches_that_are_lost_do_not_count(lost) -> None:
    """Every ninth one is: x is held where it began, as without."""

    def objective(w, i):
        return jnp.where(i < 0, -w[0], jnp.where(i % 9 == 8, lost, w[0]))

    guard = lossguard.loss_guard(
        climb(0.01), optax.sgd(0.0), nt=2, nc=1, checks="apart", ratchet=ratchet(cycles=5)
    )
    states, _ = play(guard, objective, jnp.ones(1), 99)
    assert states.params[-1, 0] < 1.3


@pytest.mark.usefixtures("eager")  # both branches round alike
def test_a_cycle_in_which_x_stayed_says_nothing_of_it() -> None:
    """Both optimizers leap to where nothing is finite, in the 11th cycle, and x stays."""
    leap = optimizers.faulty(0.1, at=20, fault="parameters", value=1e30)
    guard = lossguard.loss_guard(leap, leap, nt=2, nc=1, ratchet=ratchet(cycles=12))
    step = jax.jit(lambda state: guard.step(state, lambda w, i: jnp.sum(w**2)))
    state = guard.init(jnp.ones(1))
    for cycle in range(15):
        before = state.params
        state, decision = step(state)
        assert decision.winner == (-1 if cycle == 10 else 1)
        assert state.params[0] <= before[0]


def test_it_leaves_the_fallbacks_own_path_alone() -> None:
    """On it x is s, whatever its losses do, and b takes no forward passes."""
    trusted = optax.sgd(-0.1)  # ascends
    guard = lossguard.loss_guard(
        optax.sgd(-1.0), trusted, nt=2, nc=1, hedge="only", ratchet=ratchet(cycles=1)
    )
    alone = lossguard.unguarded(trusted, nt=2)
    state, single = guard.init(jnp.ones(2)), alone.init(jnp.ones(2))
    for _ in range(5):
        state, decision = guard.step(state, lambda w, i: jnp.sum(w**2))
        single, _ = alone.step(single, lambda w, i: jnp.sum(w**2))
        np.testing.assert_array_equal(state.params, single.params)
        np.testing.assert_array_equal(state.inner.ratchet.best.params, single.params)
        assert (decision.winner, decision.forwards) == (1, 2)


def test_a_second_cycle_compiles_nothing() -> None:
    guard = lossguard.loss_guard(
        optax.adam(0.1), optax.adam(0.1), nt=2, nc=1, ratchet=ratchet(cycles=2)
    )
    step = jax.jit(lambda state: guard.step(state, lambda w, i: jnp.sum(w**2)))
    state = guard.init(jnp.ones(2))
    for _ in range(4):
        state, _ = step(state)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cycles": 0}, "cycles must be an integer of at least 1, got 0"),
        ({"tolerance": -0.1}, "tolerance must be at least 0 and finite, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must be at least 0 and finite, got nan"),
    ],
)
def test_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ratchet(**arguments)


def test_it_begins_anew_when_it_runs_next_though_it_waits() -> None:
    """Its state counts its steps: one in each probe, whatever was before."""
    counts = optax.GradientTransformation(
        lambda params: jnp.int32(0), lambda updates, state, params=None: (10 * updates, state + 1)
    )
    guard = lossguard.loss_guard(
        counts,
        optax.sgd(-0.1),
        nt=1,
        nc=1,
        probing=lossguard.backoff(patience=1, most=4),
        ratchet=ratchet(cycles=2, tolerance=0.0),
    )
    states, decisions = play(guard, lambda w, i: w @ w, jnp.ones(2), 6)
    np.testing.assert_array_equal(decisions.winner, [1, -1, 1, -1, 1, -1])
    np.testing.assert_array_equal(decisions.learned_updates, [1, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(states.inner.lanes.learned[0], 6 * [1])


def test_a_lane_that_won_has_won_for_probing_though_x_went_back() -> None:
    """By the checks w should rise, by the training losses fall."""
    guard = lossguard.loss_guard(
        optax.sgd(-1.0),
        optax.sgd(0.0),
        nt=1,
        nc=1,
        checks="apart",
        probing=lossguard.backoff(patience=1, most=4),
        ratchet=ratchet(cycles=2),
    )
    _, decisions = play(guard, lambda w, i: jnp.where(i < 0, -w, w).sum(), jnp.zeros(1), 4)
    np.testing.assert_array_equal(decisions.winner, [0, -1, 0, -1])
    np.testing.assert_array_equal(decisions.learned_updates, 1)


def test_of_b_as_many_losses_are_taken_as_of_x_however_long_the_cycle() -> None:
    guard = lossguard.loss_guard(
        optax.sgd(0.3),
        optax.sgd(0.1),
        nt=2,
        nc=2,
        windows=lossguard.adaptive(most=4),
        ratchet=ratchet(cycles=3),
    )
    _, decisions = play(guard, lambda w, i: w @ w, jnp.ones(2), 6)
    np.testing.assert_array_equal(decisions.winner, 0)
    np.testing.assert_array_equal(decisions.forwards, 2 * 2 + decisions.steps)


def test_in_the_cycle_in_which_x_leaves_b_is_still_x() -> None:
    guard = lossguard.loss_guard(
        optax.sgd(0.3), optax.sgd(0.1), nt=2, nc=1, hedge=True, ratchet=ratchet(cycles=5)
    )
    state, decision = guard.step(guard.init(jnp.ones(2)), lambda w, i: w @ w)
    assert decision.winner == 0 and not state.inner.lanes.on_own
    np.testing.assert_array_equal(state.inner.ratchet.best.params, state.params)
    assert state.inner.ratchet.cycles == 0  # those from here on count


def test_x_stays_on_the_fallbacks_own_path_where_it_goes_back_there() -> None:
    """Though b was lower than s was: y leaps to -1, s goes on to -0.8 and -1.6; the loss is w."""
    guard = lossguard.loss_guard(
        optax.sgd(lambda k: jnp.where(k == 0, 1.0, 0.0)),
        optax.sgd(0.8),
        nt=1,
        nc=1,
        hedge="only",
        ratchet=ratchet(cycles=1),
    )
    states, decisions = play(guard, lambda w, i: w.sum(), jnp.zeros(1), 2)
    np.testing.assert_array_equal(decisions.winner, [0, 1])
    np.testing.assert_allclose(states.params[:, 0], [-1.0, -1.6])
    np.testing.assert_array_equal(states.inner.ratchet.best.params, states.params)
