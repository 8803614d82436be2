"""Backoff: when the learned lanes run, what it costs, and what holds while they don't."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from lossguard.guards.probing import init_probing
from problems import CONVEX
from runs import play, side_by_side

import lossguard

NT, NC = 2, 3


def is_probe(decisions) -> np.ndarray:
    """In which cycles learned lanes ran."""
    return np.asarray(decisions.learned_updates) > 0


def waits(patience: int, most: int, wins: dict[int, bool], cycles: int) -> list[int]:
    """The cycles that are probes, in plain Python: ``wins`` says which of them are won."""
    probes, cycle, lost, wait = [], 0, 0, 0
    while cycle < cycles:
        probes.append(cycle)
        lost = 0 if wins.get(cycle) else lost + 1
        wait = min(max(1, 2 * wait), most) if lost >= patience else 0
        cycle += 1 + wait
    return probes


def test_waits_by_hand() -> None:
    """What the reference must say: three losses, then waits of 1, 2, 4, 8, 8 cycles."""
    assert waits(3, 8, {}, 32) == [0, 1, 2, 4, 7, 12, 21, 30]
    assert waits(1, 2, {4: True}, 10) == [0, 2, 5, 8]
    assert waits(2, 4, {3: True}, 10) == [0, 1, 3, 4, 5, 7]


@pytest.mark.parametrize(("patience", "most"), [(3, 8), (1, 1), (1, 128), (10, 5)])
@pytest.mark.parametrize("won", [(), (4,), (0, 1, 2, 12), (7, 12, 21, 22)])
def test_the_pattern(patience, most, won) -> None:
    """A win, wherever it happens, brings the learned lanes back and begins the count again."""
    update = jax.jit(lossguard.backoff(patience=patience, most=most).update)
    state, probes = init_probing(), []
    for cycle in range(200):
        probed = bool(state.left == 0)
        if probed:
            probes.append(cycle)
        state = update(state, jnp.array(probed), jnp.array(probed and cycle in won))
    assert probes == waits(patience, most, dict.fromkeys(won, True), 200)
    assert update._cache_size() == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "patience must be an integer of at least 1, got 0"),
        ({"patience": True}, "patience must be an integer of at least 1, got True"),
        ({"most": 0}, "most must be an integer of at least 1, got 0"),
        ({"start": "replay"}, "start must be one of keep, reset, got 'replay'"),
    ],
)
def test_errors(arguments, message) -> None:
    with pytest.raises(ValueError) as error:
        lossguard.backoff(**arguments)
    assert str(error.value) == message


def noisy(w: jax.Array, i: jax.Array) -> jax.Array:
    xi = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), w.shape, w.dtype)
    return w @ w / 2 + xi @ w


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hedge", [False, True, "only"])
def test_a_learned_optimizer_that_always_loses(hedge) -> None:
    """It is probed ever less often; x is where the fallback alone would be on those minibatches."""
    patience, most, cycles = 3, 8, 32
    fallback = optax.adam(lambda k: 0.1 / (1 + k / 20))
    guard = lossguard.loss_guard(
        optimizers.constant(50.0),
        fallback,
        nt=NT,
        nc=NC,
        hedge=hedge,
        probing=lossguard.backoff(patience=patience, most=most),
    )
    states, decisions = play(guard, noisy, jnp.array([3.0, -1.0]), cycles)
    probes = is_probe(decisions)
    assert list(np.flatnonzero(probes)) == [0, 1, 2, 4, 7, 12, 21, 30]

    # Between probes: the fallback alone, no check minibatches, and it is said so.
    np.testing.assert_array_equal(decisions.gradients, np.where(probes, 2 * NT, NT))
    np.testing.assert_array_equal(decisions.learned_updates, np.where(probes, NT, 0))
    np.testing.assert_array_equal(decisions.forwards, np.where(probes, 2 * NC, 0))
    np.testing.assert_array_equal(np.isnan(decisions.learned_loss), ~probes)
    np.testing.assert_array_equal(np.isnan(decisions.fallback_loss), ~probes)
    np.testing.assert_array_equal(decisions.winner, 2 if hedge is True else 1)
    np.testing.assert_array_equal(states.steps, NT * np.arange(1, cycles + 1))
    np.testing.assert_array_equal(states.minibatches, np.cumsum(NT + NC * probes))
    assert not decisions.used_learned.any()

    alone = lossguard.unguarded(fallback, nt=NT)
    step = jax.jit(lambda state: alone.step(state, noisy))
    state, first = alone.init(jnp.array([3.0, -1.0])), 0
    for cycle in range(cycles):
        state, decision = step(state._replace(minibatches=jnp.int32(first)))
        np.testing.assert_allclose(states.params[cycle], state.params, rtol=1e-12)
        np.testing.assert_allclose(decisions.losses[cycle], decision.losses, rtol=1e-12)
        first = int(states.minibatches[cycle])


def good_within(radius: float) -> optax.GradientTransformation:
    """Newton's method on |w|^2 / 2 where |w| is below a radius; elsewhere up the gradient."""

    def update(updates, state, params=None):
        near = jnp.linalg.norm(updates) < radius
        return jnp.where(near, -updates, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_a_win_brings_it_back() -> None:
    """The fallback comes within 1 at last, and the next probe wins: patience begins anew."""
    guard = lossguard.loss_guard(
        good_within(1.0),
        optax.sgd(0.05),
        nt=1,
        nc=1,
        probing=lossguard.backoff(patience=2, most=16),
    )
    _, decisions = play(guard, lambda w, i: w @ w / 2, jnp.array([0.0, 3.0]), 40)
    probes = np.flatnonzero(is_probe(decisions))
    won = np.flatnonzero(np.asarray(decisions.winner) == 0)
    assert won.tolist() == [won[0]]
    assert won[0] >= 22  # 3 (0.95)^k < 1 from k = 22 on
    assert probes[probes <= won[0]].tolist() == waits(2, 16, {}, won[0] + 1)
    # At the minimum both are equal, and ties are lost.
    after = probes[probes > won[0]]
    assert (after - won[0] - 1).tolist() == waits(2, 16, {}, 40 - won[0] - 1)


class Steps:
    """An optimizer that counts its own steps, and makes all of them 0."""

    @staticmethod
    def init(params):
        return jnp.int32(0)

    @staticmethod
    def update(updates, state, params=None):
        return jax.tree.map(jnp.zeros_like, updates), state + 1


@pytest.mark.parametrize("loser", ["keep", "rollback", "reset"])
@pytest.mark.parametrize("start", ["keep", "reset"])
def test_what_a_probe_starts_from(start, loser) -> None:
    """With "reset" every probe after a wait begins fresh; without waits nothing is reset."""
    guard = lossguard.loss_guard(
        optax.GradientTransformation(Steps.init, Steps.update),
        optax.sgd(0.1),
        nt=NT,
        nc=NC,
        loser=loser,
        probing=lossguard.backoff(patience=3, most=4, start=start),
    )
    states, decisions = play(guard, lambda w, i: w @ w, jnp.ones(2), 20)
    probes = np.flatnonzero(is_probe(decisions))
    assert probes.tolist() == [0, 1, 2, 4, 7, 12, 17]
    counts = np.asarray(states.inner.lanes.learned[0])
    ran = {"keep": np.arange(1, 8) * NT, "reset": np.array([1, 2, 3, 1, 1, 1, 1]) * NT}[start]
    np.testing.assert_array_equal(counts[probes], ran if loser == "keep" else 0)
    waiting = np.setdiff1d(np.arange(20), probes)
    np.testing.assert_array_equal(counts[waiting], counts[waiting - 1])


def test_a_lane_that_begins_anew_goes_on_with_its_schedule() -> None:
    guard = lossguard.loss_guard(
        optax.sgd(lambda k: 0.0),
        optax.sgd(0.1),
        nt=NT,
        nc=NC,
        probing=lossguard.backoff(patience=1, most=2, start="reset"),
    )
    states, decisions = play(guard, lambda w, i: w @ w, jnp.ones(2), 8)
    counts = optax.tree.get(states.inner.lanes.learned[0], "count")
    np.testing.assert_array_equal(counts, NT * np.cumsum(is_probe(decisions)))


def test_after_a_win_nothing_is_reset() -> None:
    """start="reset" is for probes after a wait: a lane that wins goes on with its momentum."""
    guard = lossguard.loss_guard(
        optax.sgd(0.02, momentum=0.9),
        optax.sgd(0.001),
        nt=NT,
        nc=NC,
        probing=lossguard.backoff(patience=1, most=4, start="reset"),
    )
    plain = lossguard.loss_guard(optax.sgd(0.02, momentum=0.9), optax.sgd(0.001), nt=NT, nc=NC)
    objective, start = lambda w, i: w @ w / 2, jnp.array([1.0, -2.0])
    (one, decisions), (other, _) = (play(g, objective, start, 3) for g in (guard, plain))
    assert decisions.used_learned.all()
    np.testing.assert_array_equal(one.params, other.params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hedge", [False, True])
def test_vmap_is_a_loop(hedge) -> None:
    """Of vmapped seeds some probe where others wait."""
    guard = lossguard.loss_guard(
        good_within(0.7),
        optax.sgd(0.1, momentum=0.5),
        nt=NT,
        nc=NC,
        hedge=hedge,
        probing=lossguard.backoff(patience=2, most=8, start="reset"),
    )

    def run(start, key):
        xi = 0.1 * jax.random.normal(key, (30 * (NT + NC), 2))

        def objective(w, i):
            return w @ w / 2 + xi[i] @ w

        return jax.lax.scan(
            lambda state, _: guard.step(state, objective), guard.init(start), length=30
        )

    starts = jnp.array([0.1, 1.0, 3.0, 10.0])[:, None] * jnp.array([0.6, 0.8])
    keys = jax.random.split(jax.random.key(0), 4)
    states, decisions = side_by_side(run, starts, keys)
    probes = is_probe(decisions)
    assert (probes.any(axis=0) & ~probes.all(axis=0)).any()
    assert len(np.unique(states.minibatches)) > 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("hedge", "start"),
    [(False, "keep"), (True, "reset"), ("only", "keep"), (lossguard.track_record(), "reset")],
)
def test_theorem_5_with_backoff(hedge, start) -> None:
    """E_k <= (1 - (2 mu a / L)(1 - a / 2))^k E_0, in the cycles between probes too.

    Against learned lanes that overflow among others: x is finite for ever. With "only" the bound
    is one for the fallback's own path, which starts from the same point. Hedged x is never above
    that path, in the cycles of probes at least, and with "only" in all.
    """
    problem = CONVEX["quadratic"]()
    x = jnp.zeros_like(problem.minimum) + 2.0
    a, cycles = 0.5, 60

    def one(which):
        guard = lossguard.loss_guard(
            optimizers.hostile(which, 1 / problem.L),
            optax.sgd(a / problem.L),
            nt=NT,
            nc=1,
            hedge=hedge,
            probing=lossguard.backoff(patience=2, most=8, start=start),
        )

        def step(state, _):
            state, decision = guard.step(state, problem)
            own = problem.excess(state.inner.lanes.own.params) if hedge else jnp.inf
            return state, (state.params, problem.excess(state.params), own, decision)

        return jax.lax.scan(step, guard.init(x), length=cycles)[1]

    params, excess, own, decisions = jax.jit(jax.vmap(one))(jnp.arange(len(optimizers.HOSTILE)))
    assert np.isfinite(params).all()
    factor = 1 - 2 * problem.mu * a / problem.L * (1 - a / 2)
    bound = factor ** (NT * np.arange(1, cycles + 1)) * problem.excess(x)
    assert (excess <= bound + 1e-14).all()
    probes = is_probe(decisions)
    if hedge in (False, True, "only"):  # by a record, what is promised is of sums
        assert (excess <= own)[probes | (hedge == "only")].all()
    overflows = optimizers.HOSTILE.index("overflows")
    assert probes[overflows].sum() < 15
    assert not decisions.used_learned[overflows].any()
    finite = np.asarray(decisions.finite_learned)[overflows]
    assert finite[~probes[overflows]].all()  # where it did not run
    if start == "keep":  # begun afresh each time, it does not get to infinity in two steps
        assert not finite[probes[overflows]].all()
    assert np.asarray(decisions.used_learned).any()


def valley(w: jax.Array, i: jax.Array) -> jax.Array:
    """A valley that is steep on the left, and hardly slopes on the right."""
    return jnp.where(w[0] < 0, 4 * w[0] ** 2, 0.001 * w[0] ** 2) + 0.0 * i


@pytest.mark.usefixtures("x64")
def test_what_backoff_weakens() -> None:
    """While the learned lane waits x follows z, and s may pass it; the next probe sees to that.

    The learned optimizer leaps to where the loss is lower and the slope small. So x, ahead at
    first, stands almost still; s passes it, and takes over when next there is a check.
    """

    def leap(updates, state, params=None):
        return jnp.where(params < -0.9, 4.0 - params, 0.5), state

    guard = lossguard.loss_guard(
        optax.GradientTransformation(lambda params: optax.EmptyState(), leap),
        optax.sgd(0.02),
        nt=1,
        nc=1,
        hedge=True,
        probing=lossguard.backoff(patience=1, most=8),
    )
    states, decisions = play(guard, valley, jnp.array([-1.0]), 40)
    x, s = (
        np.array([valley(w, 0) for w in ws])
        for ws in (states.params, states.inner.lanes.own.params)
    )
    probes = is_probe(decisions)
    assert decisions.winner[0] == 0
    assert (x <= s)[probes].all()
    behind = np.flatnonzero(x > s)
    assert behind.size  # it does happen
    assert len(behind) <= 8  # and lasts for one wait at most
    assert (np.diff(behind) == 1).all()
    assert decisions.winner[behind[-1] + 1] == 2
    assert probes[behind[-1] + 1]


def test_checks_apart_are_numbered_without_gaps() -> None:
    """Check losses are their minibatches' numbers, alike in both lanes: every check takes all 8."""
    guard = lossguard.loss_guard(
        optax.sgd(-1.0),
        optax.sgd(0.1),
        nt=2,
        nc=3,
        checks="apart",
        criterion=lossguard.sequential_criterion(first=2, most=8),
        probing=lossguard.backoff(patience=2, most=2),
    )
    _, decisions = play(guard, lambda w, i: jnp.where(i < 0, i, w @ w), jnp.ones(2), 6)
    np.testing.assert_array_equal(decisions.forwards, [16, 16, 0, 16, 0, 0])
    np.testing.assert_allclose(decisions.learned_loss[jnp.array([0, 1, 3])], [-4.5, -12.5, -20.5])
