"""Lane s, the fallback on its own path, and several learned lanes.

Lanes as a guard numbers them: the learned ones from 0, then z, then s.
"""

from copy import deepcopy
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpy_guards
import optax
import optimizers
import pytest
from scipy import stats

import lossguard
from lossguard.guards.verdict import judge
from lossguard.tasks import Noisy, quadratic, ridge_logistic

NT, NC, CYCLES = 3, 2, 30
S = {True: 2, "only": 1}
"""The number of lane s beside one learned lane."""
EVIDENCE = lossguard.paired_criterion(confidence=0.6)


def by_numpy(problem, learned, fallback, *, hedge, loser: str, cycles: int):
    """The docstring of ``loss_guard``, in plain loops; z always runs, also where it is s."""
    z_lane, s_lane = fallback, deepcopy(fallback)
    confidence = 0.6 if hedge is EVIDENCE else 0.5  # at 0.5 the t-test compares means
    x = s = problem.start
    i = 0
    for _ in range(cycles):
        trusted = [(z_lane, x)] if hedge != "only" else []
        lanes = [*((one, x) for one in learned), *trusted, (s_lane, s)]
        before = [deepcopy(optimizer.memory) for optimizer, _ in lanes]
        ends, losses, checks = [], [], []
        for optimizer, w in lanes:
            losses.append([])
            for t in range(NT):
                losses[-1].append(problem.loss(w, i + t))
                w = optimizer.step(w, problem.gradient(w, i + t))
            ends.append(w)
            checks.append(np.array([problem.loss(w, i + NT + j) for j in range(NC)]))
        m = len(learned)
        winner = min([m, *range(m)], key=lambda lane: checks[lane].mean())  # the first of equals
        if hedge != "only":
            d = checks[winner] - checks[-1]
            p = stats.ttest_1samp(d, 0, alternative="greater").pvalue if d.any() else 0
            winner = m + 1 if p < 1 - confidence else winner
        x, s = ends[winner], ends[-1]
        i += NT + NC
        for lane, (optimizer, _) in enumerate(lanes[:-1]):
            if lane != winner and loser != "keep":
                if loser == "rollback":
                    optimizer.memory = before[lane]
                else:
                    optimizer.forget()
        if winner == len(lanes) - 1:  # x is s: z goes on as s does
            z_lane.memory = deepcopy(s_lane.memory)
        yield {
            "x": x,
            "s": s,
            "winner": winner,
            "losses": losses[winner],
            "learned_loss": min(check.mean() for check in checks[:m]),
            "fallback_loss": min(check.mean() for check in checks[m:]),
        }


def objective_of(problem: numpy_guards.Objective):
    a, m, xi = jnp.asarray(problem.a), jnp.asarray(problem.m), jnp.asarray(problem.xi)
    return lambda w, i: 0.5 * jnp.sum(a * (w - m) ** 2) + xi[i] @ w


def decay(rate: float):
    return lambda k: rate / (1 + 0.025 * k)


# The same optimizers twice: in NumPy, and in optax.
OPTIMIZERS = {
    "sgd": lambda: (numpy_guards.Momentum(decay(0.3)), optax.sgd(decay(0.3))),
    "momentum": lambda: (
        numpy_guards.Momentum(decay(0.3), 0.8),
        optax.sgd(decay(0.3), momentum=0.8),
    ),
    "adam": lambda: (numpy_guards.Adam(decay(0.4)), optax.adam(decay(0.4))),
    "ascent": lambda: (numpy_guards.Momentum(lambda k: -0.5), optax.sgd(-0.5)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("learned", "fallback", "hedge", "loser"),
    [
        (["adam"], "momentum", True, "keep"),
        (["adam"], "momentum", True, "rollback"),
        (["momentum"], "adam", True, "reset"),
        (["adam"], "momentum", EVIDENCE, "keep"),
        (["momentum"], "adam", EVIDENCE, "reset"),
        (["adam"], "momentum", "only", "keep"),
        (["momentum"], "adam", "only", "rollback"),
        (["ascent", "adam", "sgd"], "momentum", True, "keep"),
        (["ascent", "adam", "sgd"], "momentum", True, "reset"),
        (["ascent", "adam", "sgd"], "momentum", EVIDENCE, "keep"),
    ],
)
def test_a_run_is_numpys(learned, fallback, hedge, loser) -> None:
    """Every lane wins at times, and all of them are where they should be."""
    problem = numpy_guards.Objective(seed=4, minibatches=CYCLES * (NT + NC))
    numpy_learned, optax_learned = zip(*(OPTIMIZERS[name]() for name in learned), strict=True)
    numpy_fallback, optax_fallback = OPTIMIZERS[fallback]()
    guard = lossguard.loss_guard(
        optax_learned, optax_fallback, nt=NT, nc=NC, loser=loser, hedge=hedge
    )
    objective = objective_of(problem)
    step = jax.jit(lambda state: guard.step(state, objective))
    state, winners, on_own = guard.init(jnp.asarray(problem.start)), [], True
    m = len(learned)
    last = m + (hedge != "only")
    expected = by_numpy(
        problem, numpy_learned, numpy_fallback, hedge=hedge, loser=loser, cycles=CYCLES
    )
    for cycle, want in enumerate(expected):
        state, decision = step(state)
        assert decision.winner == want["winner"]
        np.testing.assert_allclose(state.params, want["x"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.inner.own.params, want["s"], rtol=1e-9, atol=1e-12)
        for name in ("losses", "learned_loss", "fallback_loss"):
            np.testing.assert_allclose(getattr(decision, name), want[name], rtol=1e-9)
        assert (decision.used_learned == (want["winner"] < m)).all()
        # z is skipped where it would be s.
        lanes = m + (2 if hedge != "only" and not on_own else 1)
        assert decision.gradients == lanes * NT
        assert decision.forwards == lanes * NC
        assert decision.learned_updates == m * NT
        assert state.minibatches == (cycle + 1) * (NT + NC)
        on_own = want["winner"] == last
        assert state.inner.on_own == on_own
        winners.append(want["winner"])
    hostile = {learned.index("ascent")} if "ascent" in learned else set()
    assert set(winners) | hostile == set(range(last + 1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loser", ["keep", "reset"])
def test_skipping_z_changes_nothing(loser) -> None:
    """The same run where z is computed although it is s."""
    problem = numpy_guards.Objective(seed=4, minibatches=CYCLES * (NT + NC))
    objective = objective_of(problem)
    guard = lossguard.loss_guard(
        optax.adam(decay(0.4)),
        optax.sgd(decay(0.3), momentum=0.8),
        nt=NT,
        nc=NC,
        hedge=True,
        loser=loser,
    )

    def run(skip: bool):
        def step(state, _):
            inner = state.inner
            on_own = inner.on_own if skip else jnp.array(False)
            state, decision = guard.step(
                state._replace(inner=inner._replace(on_own=on_own)), objective
            )
            return state, (state, decision)

        start = guard.init(jnp.asarray(problem.start))
        return jax.jit(lambda start: jax.lax.scan(step, start, length=CYCLES)[1])(start)

    (skipping, one), (computing, other) = run(True), run(False)
    jax.tree.map(np.testing.assert_array_equal, skipping, computing)
    for name in ("winner", "losses", "learned_loss", "fallback_loss", "used_learned"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (np.asarray(one.gradients) < np.asarray(other.gradients)).any()
    assert (np.asarray(other.gradients) == 3 * NT).all()
    assert set(np.asarray(one.winner)) == {0, 1, 2}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hedge", [True, "only"])
def test_lane_s_is_the_fallback_alone(hedge) -> None:
    """On the same training minibatches; the guard's cursor passes over check minibatches too."""
    problem = numpy_guards.Objective(seed=4, minibatches=CYCLES * (NT + NC))
    objective, start = objective_of(problem), jnp.asarray(problem.start)
    fallback = optax.adam(decay(0.2))
    guard = lossguard.loss_guard(
        optax.sgd(0.5, momentum=0.8), fallback, nt=NT, nc=NC, hedge=hedge, loser="reset"
    )
    alone = lossguard.unguarded(fallback, nt=NT)
    step = jax.jit(lambda state: guard.step(state, objective))
    step_alone = jax.jit(lambda state: alone.step(state, objective))
    state, single, winners = guard.init(start), alone.init(start), set()
    for _ in range(CYCLES):
        single, _ = step_alone(single._replace(minibatches=state.minibatches))
        state, decision = step(state)
        np.testing.assert_allclose(state.inner.own.params, single.params, rtol=1e-12)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
            state.inner.own.state,
            single.inner,
        )
        winners.add(int(decision.winner))
        if decision.winner == S[hedge]:
            np.testing.assert_array_equal(state.params, state.inner.own.params)
    assert winners == set(range(S[hedge] + 1))


def plateau(w: jax.Array, i: jax.Array | int) -> jax.Array:
    """F(u, v) = u^2 / 2 + 1 / (1 + exp(-5 v)), which is flat beyond v = 2, and lowest at -inf."""
    return w[0] ** 2 / 2 + jax.nn.sigmoid(5 * w[1])


def myopic() -> optax.GradientTransformation:
    """To u = 0 at once, and onto the plateau: lower now, but nothing leads on from there."""

    def update(updates, state, params=None):
        return jnp.array([0.0, 2.0]) - params, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hedge", [False, True, "only"])
def test_it_is_not_myopic(hedge) -> None:
    """The paper's guard stays on a plateau that won one cycle; the hedged one leaves it."""
    start, fallback = jnp.array([3.0, 0.0]), optax.sgd(0.05)
    guard = lossguard.loss_guard(myopic(), fallback, nt=10, nc=1, hedge=hedge)
    alone = lossguard.unguarded(fallback, nt=10)

    def step(states, _):
        guarded, decision = guard.step(states[0], plateau)
        single, _ = alone.step(states[1], plateau)
        return (guarded, single), (plateau(guarded.params, 0), plateau(single.params, 0), decision)

    states = guard.init(start), alone.init(start)
    x, s, decisions = jax.jit(lambda s: jax.lax.scan(step, s, length=40)[1])(states)
    assert decisions.winner[0] == 0
    assert x[0] < s[0]
    if hedge:
        assert (x <= s + 1e-14).all()
        assert x[-1] < 0.1
        assert decisions.winner[-1] == S[hedge]
    else:
        assert x[-1] > 0.99
        assert s[-1] < 0.1


PROBLEMS = {
    "quadratic": lambda: quadratic(jax.random.key(0), n=6, mu=0.05, L=2.0, distance=3.0),
    "ridge": lambda: ridge_logistic(jax.random.key(0), n=4, samples=50, mu=0.1),
    "nonconvex": lambda: nonconvex,
}


def nonconvex(w: jax.Array, i: jax.Array | int = 0) -> jax.Array:
    """Many valleys."""
    return jnp.sum(w**2 / 20 + 1 - jnp.cos(3 * w))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("hedge", "problem", "fallback"),
    [
        (True, "quadratic", "sgd"),
        ("only", "ridge", "adam"),
        (True, "nonconvex", "adam"),
        ("only", "nonconvex", "sgd"),
    ],
)
def test_never_worse_than_the_fallback_alone(hedge, problem, fallback) -> None:
    """In every cycle where checks are exact, convex or not, whatever the learned optimizer does."""
    f = PROBLEMS[problem]()
    start = 2.0 + 0.1 * jnp.arange(4.0 if problem == "ridge" else 6.0)
    trusted = optax.sgd(0.05) if fallback == "sgd" else optax.adam(0.1)
    alone = lossguard.unguarded(trusted, nt=NT)

    def one(which):
        guard = lossguard.loss_guard(
            optimizers.hostile(which, 0.15 if problem == "nonconvex" else 0.4),
            trusted,
            nt=NT,
            nc=1,
            hedge=hedge,
        )

        def step(states, _):
            guarded, decision = guard.step(states[0], f)
            single, _ = alone.step(states[1], f)
            return (guarded, single), (f(guarded.params), f(single.params), decision.winner)

        return jax.lax.scan(step, (guard.init(start), alone.init(start)), length=60)[1]

    x, s, winner = jax.jit(jax.vmap(one))(jnp.arange(len(optimizers.HOSTILE)))
    assert np.isfinite(x).all()
    assert (x <= s * (1 + 1e-12) + 1e-13).all()
    turns = optimizers.HOSTILE.index("turns")
    assert (winner[turns] == 0).any()
    assert (x[turns] < 0.99 * s[turns]).any()


NOT_GONE_BACK = 1.09
"""The largest u P(t <= t_0.95), t noncentral by u with 3 degrees of freedom."""


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("hedge", "constant"),
    [("only", 0.171), (lossguard.paired_criterion(confidence=0.95), NOT_GONE_BACK)],
    ids=["means", "evidence"],
)
def test_one_more_error_does_not_add_to_the_last(hedge, constant) -> None:
    """Under noise: E f(x) <= E f(s) + c sum E tau / sqrt(nc) after any number of cycles.

    tau is the deviation of F(lane, j) - F(s, j), summed over y and z. s knows nothing of wrong
    decisions, so that only the last one counts; test_criteria has the constant of means.
    """
    problem, sigma, seeds, cycles = PROBLEMS["quadratic"](), 2.0, 300, 60
    learned = optimizers.hostile(1)  # wanders
    fallback = optax.sgd(0.1)
    guard = lossguard.loss_guard(learned, fallback, nt=1, nc=4, hedge=hedge)
    branch, trusted = lossguard.unguarded(learned, nt=1), lossguard.unguarded(fallback, nt=1)
    start = jnp.zeros(6)

    def one(key):
        objective = Noisy(problem, key, sigma)

        def step(state, _):
            y, _ = branch.step(state._replace(inner=state.inner.learned[0]), objective)
            z = (
                y
                if hedge == "only"
                else trusted.step(state._replace(inner=fallback.init(start)), objective)[0]
            )
            state, decision = guard.step(state, objective)
            s = state.inner.own.params
            apart = jnp.linalg.norm(y.params - s)
            apart += 0 if hedge == "only" else jnp.linalg.norm(z.params - s)
            tau = sigma / 6**0.5 * apart
            regret = problem.excess(state.params) - problem.excess(s)
            return state, (regret, tau, decision.winner)

        return jax.lax.scan(step, guard.init(start), length=cycles)[1]

    regret, tau, winner = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), seeds))
    error = 3 * regret.std(axis=0) / seeds**0.5
    assert (regret.mean(axis=0) <= constant * tau.mean(axis=0) / 4**0.5 + error).all()
    wrong = regret > 0
    assert wrong.mean() > 0.02  # decisions do go wrong
    assert 0.02 < (winner == 0).mean() < 0.98


@pytest.mark.parametrize("loser", ["keep", "rollback", "reset"])
def test_s_begins_again_at_x(loser) -> None:
    """Where it is no longer finite, with a fresh state but for its schedule."""
    fallback = optax.chain(
        optimizers.faulty(0.01, at=5, fault="parameters", value=np.inf),
        optax.scale_by_schedule(lambda k: 1.0 / (1 + k)),
    )
    guard = lossguard.loss_guard(optax.sgd(0.3), fallback, nt=NT, nc=NC, hedge=True, loser=loser)
    step = jax.jit(lambda state: guard.step(state, lambda w, i: w @ w))
    state = guard.init(jnp.array([1.0, -2.0]))
    for cycle in range(4):
        state, decision = step(state)
        assert decision.winner == 0
        own, schedule = state.inner.own, state.inner.own.state[1]
        if cycle == 1:  # step number 5 is its last
            np.testing.assert_array_equal(own.params, state.params)
            jax.tree.map(np.testing.assert_array_equal, own.state, state.inner.fallback)
        else:
            assert (own.params != state.params).any()
        assert schedule.count == (cycle + 1) * NT
        assert state.inner.on_own == (cycle == 1)
        assert decision.reset_fallback == (cycle == 1)
        assert np.isfinite(own.params).all()
        # z coincides with s while nothing was lost, and again after s began again
        assert decision.gradients == (2 if cycle in (0, 2) else 3) * NT


def test_going_back_takes_evidence() -> None:
    """One hard minibatch makes the mean of y higher than that of s, but is no evidence."""
    y = np.full(10, 0.003)
    s, z = np.full(10, 0.02), np.full(10, 0.3)
    y[4] = 0.2
    paired, mean = lossguard.paired_criterion(confidence=0.95), lossguard.mean_criterion()

    def kept(back, y: np.ndarray) -> int:
        checks = jnp.asarray(np.stack([y, z, s]), jnp.float32)
        return int(judge(mean, back, checks, jnp.int32(10), jnp.ones(3, bool), 1).row)

    assert y.mean() > s.mean()
    assert (kept(mean, y), kept(paired, y)) == (2, 0)
    y = np.linspace(0.02, 0.04, 10)
    assert (kept(mean, y), kept(paired, y)) == (2, 2)
    assert (kept(mean, s), kept(paired, s)) == (2, 2)  # a tie


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("m", [1, 3])
def test_going_back_looks_until_it_is_settled(m) -> None:
    """hedge=sequential_criterion(): SciPy's t-test says where it stops, and who won.

    In the first cycle y leaps, unopposed, from the origin to where the loss is lower by 0.4 + xi_i.
    In the second all lanes stand still: s at the origin, and x with z where y is, for a tie. Of
    vmapped seeds each draws as many check minibatches as it needs.
    """
    seeds, confidence = 200, 0.9
    back = lossguard.sequential_criterion(confidence=confidence, first=4, most=32)

    def leap(updates, state, params=None):
        return jnp.where(state == 0, jnp.array([-0.4, 1.0]), 0.0), state + 1

    once = optax.GradientTransformation(lambda params: jnp.int32(0), leap)
    learned = [optax.sgd(0.0)] * (m - 1) + [once]
    guard = lossguard.loss_guard(learned, optax.sgd(0.0), nt=1, hedge=back)

    def run(key):
        xi = jax.random.normal(key, (40,)) * (jnp.arange(40) > 4)  # 1 + 4 minibatches without noise

        def objective(w, i):
            return w[0] + w[1] * xi[i]

        first, one = guard.step(guard.init(jnp.zeros(2)), objective)
        second, other = guard.step(first, objective)
        return xi, one, other, second.minibatches - first.minibatches - 1

    xi, first, second, drawn = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), seeds))
    assert (first.winner == m - 1).all()
    assert (first.forwards == (m + 1) * 4).all()
    level = (1 - confidence) / len(back.looks)
    for seed in range(seeds):
        for n in back.looks:
            gain = np.asarray(xi[seed, 6 : 6 + n]) - 0.4
            p = stats.ttest_1samp(gain, 0, alternative="greater").pvalue
            if min(p, 1 - p) < level:
                break
        assert drawn[seed] == n
        assert second.forwards[seed] == (m + 2) * n
        assert second.winner[seed] == (m + 1 if p < level else m)
    assert set(np.asarray(drawn)) == {4, 8, 16, 32}
    assert set(np.asarray(second.winner)) == {m, m + 1}


@cache
def hedged(several: bool, hedge):
    learned = optax.adam(0.4)
    guard = lossguard.loss_guard(
        [learned] if several else learned, optax.sgd(0.1), nt=NT, nc=NC, hedge=hedge
    )
    problem = numpy_guards.Objective(seed=4, minibatches=20 * (NT + NC))
    objective = objective_of(problem)
    step = jax.jit(
        lambda state: jax.lax.scan(lambda s, _: guard.step(s, objective), state, length=20)
    )
    return step(guard.init(jnp.asarray(problem.start, jnp.float32)))


@pytest.mark.parametrize("hedge", [False, True, EVIDENCE])
def test_a_list_of_one_is_the_one(hedge) -> None:
    jax.tree.map(np.testing.assert_array_equal, hedged(True, hedge), hedged(False, hedge))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hedge", [False, True])
def test_a_hostile_candidate_changes_nothing(hedge) -> None:
    """Beside a good one it is as if it weren't there, but for its costs."""
    problem = numpy_guards.Objective(seed=4, minibatches=CYCLES * (NT + NC))
    objective = objective_of(problem)
    good, hostile = optax.adam(decay(0.4)), optimizers.hostile(3)  # overflows

    def play(learned):
        guard = lossguard.loss_guard(learned, optax.sgd(0.2), nt=NT, nc=NC, hedge=hedge)

        def step(state, _):
            state, decision = guard.step(state, objective)
            return state, (state.params, decision)

        start = guard.init(jnp.asarray(problem.start))
        return jax.jit(lambda start: jax.lax.scan(step, start, length=CYCLES)[1])(start)

    alone, decisions = play(good)
    for learned, place in (([good, hostile], 0), ([hostile, good], 1)):
        x, both = play(learned)
        np.testing.assert_allclose(x, alone, rtol=1e-12)
        np.testing.assert_array_equal(both.winner == place, decisions.winner == 0)
        assert (both.learned_updates == 2 * NT).all()
        assert both.finite_learned.all()  # any of them
    assert (decisions.winner == 0).any()
    assert (decisions.winner != 0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hedge": "always"}, "hedge must be False, True, 'only' or a criterion, got 'always'"),
        (
            {"learned": []},
            "the number of learned optimizers must be an integer of at least 1, got 0",
        ),
    ],
)
def test_errors(arguments, message) -> None:
    with pytest.raises(ValueError) as error:
        lossguard.loss_guard.__wrapped__(
            **({"learned": optax.sgd(1.0), "fallback": optax.sgd(1.0)} | arguments)
        )
    assert str(error.value) == message
