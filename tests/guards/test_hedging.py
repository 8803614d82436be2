"""Lane s, the fallback on its own path.

Lanes as a guard numbers them: the learned ones from 0, then z, then s.
"""

from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import numpy_guards
import optax
import optimizers
import pytest
from problems import CONVEX, decay, noisy, objective_of, valleys
from runs import play

import lossguard

NT, NC, CYCLES = 3, 2, 30
S = {True: 2, "only": 1}
"""The number of lane s beside one learned lane."""
RECORD = lossguard.track_record(decay=0.6, share=0.5)


def by_numpy(problem, learned, fallback, *, hedge, loser: str, cycles: int):
    """The docstring of ``loss_guard``, in plain loops; z always runs, also where it is s."""
    z_lane, s_lane = fallback, deepcopy(fallback)
    x = s = problem.start
    i, a, excess, worst, recent = 0, 0, 0.0, 0.0, 0.0
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
        if hedge is RECORD:
            if winner == m and x is s:
                winner = m + 1
            d = sum(losses[winner]) - sum(losses[-1])
            a += 1
            rho = max(0.6, 1 - 1 / max(0.5 * a, 1))
            excess, worst, recent = rho * excess + d, max(rho * worst, d), 0.6 * recent + d
            if excess > (0 if x is s else worst):
                winner = m + 1
            if winner == m + 1:
                a, excess, worst, recent = 0, 0.0, 0.0, 0.0
        else:
            winner = min([len(lanes) - 1, winner], key=lambda lane: checks[lane].mean())
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
        rivals = slice(m, m + 1) if hedge is RECORD else slice(m, None)
        given_out = m + 1 if recent > 0 else winner
        yield {
            "given out": ends[given_out],
            "x": x,
            "s": s,
            "on own": winner == len(lanes) - 1,
            "winner": given_out,
            "losses": losses[given_out],
            "learned_loss": min(check.mean() for check in checks[:m]),
            "fallback_loss": min(check.mean() for check in checks[rivals]),
        }


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
        (["adam"], "momentum", RECORD, "keep"),
        (["momentum"], "adam", RECORD, "reset"),
        (["adam"], "momentum", "only", "keep"),
        (["momentum"], "adam", "only", "rollback"),
        (["ascent", "adam", "sgd"], "momentum", True, "keep"),
        (["ascent", "adam", "sgd"], "momentum", True, "reset"),
        (["ascent", "adam", "sgd"], "momentum", RECORD, "keep"),
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
    state, winners, on_own, beside = guard.init(jnp.asarray(problem.start)), [], True, 0
    m = len(learned)
    last = m + (hedge != "only")
    expected = by_numpy(
        problem, numpy_learned, numpy_fallback, hedge=hedge, loser=loser, cycles=CYCLES
    )
    for cycle, want in enumerate(expected):
        state, decision = step(state)
        assert decision.winner == want["winner"]
        np.testing.assert_allclose(state.params, want["given out"], rtol=1e-9, atol=1e-12)
        if hedge is RECORD:
            np.testing.assert_allclose(state.inner.x, want["x"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.inner.lanes.own.params, want["s"], rtol=1e-9, atol=1e-12)
        for name in ("losses", "learned_loss", "fallback_loss"):
            np.testing.assert_allclose(getattr(decision, name), want[name], rtol=1e-9)
        assert (decision.used_learned == (want["winner"] < m)).all()
        # z is skipped where it would be s.
        lanes = m + (2 if hedge != "only" and not on_own else 1)
        assert decision.gradients == lanes * NT
        assert decision.forwards == (m + 1 if hedge is RECORD else lanes) * NC
        assert decision.learned_updates == m * NT
        assert state.minibatches == (cycle + 1) * (NT + NC)
        on_own = want["on own"]
        assert state.inner.lanes.on_own == on_own
        winners.append(want["winner"])
        beside += want["winner"] == last and not on_own
    hostile = {learned.index("ascent")} if "ascent" in learned else set()
    assert set(winners) | hostile == set(range(last + 1))
    assert bool(beside) == (hedge is RECORD)  # s was given out while x went on


@pytest.mark.usefixtures("x64", "eager")  # both programs round alike
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

    def with_z(state, objective):
        lanes = state.inner.lanes._replace(on_own=jnp.array(False))
        return guard.step(state._replace(inner=state.inner._replace(lanes=lanes)), objective)

    (skipping, one), (computing, other) = (
        play(guard._replace(step=step), objective, jnp.asarray(problem.start), 11)
        for step in (guard.step, with_z)
    )
    jax.tree.map(np.testing.assert_array_equal, skipping, computing)
    for name in ("winner", "losses", "learned_loss", "fallback_loss", "used_learned"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (np.asarray(one.gradients) < np.asarray(other.gradients)).any()
    assert (np.asarray(other.gradients) == 3 * NT).all()
    assert set(np.asarray(one.winner)) == {0, 1, 2}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hedge", [True, "only"])
@pytest.mark.parametrize("checks", ["next", "apart"])
def test_lane_s_is_the_fallback_alone(hedge, checks) -> None:
    """On the same training minibatches; the guard's cursor may pass over check minibatches."""
    problem = numpy_guards.Objective(seed=4, minibatches=CYCLES * (NT + NC))
    objective, start = objective_of(problem), jnp.asarray(problem.start)
    fallback = optax.adam(decay(0.2))
    guard = lossguard.loss_guard(
        optax.sgd(0.5, momentum=0.8),
        fallback,
        nt=NT,
        nc=NC,
        hedge=hedge,
        loser="reset",
        checks=checks,
    )
    alone = lossguard.unguarded(fallback, nt=NT)
    step = jax.jit(lambda state: guard.step(state, objective))
    step_alone = jax.jit(lambda state: alone.step(state, objective))
    state, single, winners = guard.init(start), alone.init(start), set()
    for _ in range(CYCLES):
        if checks == "next":
            single = single._replace(minibatches=state.minibatches)
        single, _ = step_alone(single)
        state, decision = step(state)
        np.testing.assert_allclose(state.inner.lanes.own.params, single.params, rtol=1e-12)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
            state.inner.lanes.own.state,
            single.inner,
        )
        winners.add(int(decision.winner))
        if decision.winner == S[hedge]:
            np.testing.assert_array_equal(state.params, state.inner.lanes.own.params)
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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("hedge", "problem", "fallback"),
    [
        (True, "quadratic", "sgd"),
        ("only", "ridge", "adam"),
        (True, "valleys", "adam"),
        ("only", "valleys", "sgd"),
    ],
)
def test_never_worse_than_the_fallback_alone(hedge, problem, fallback) -> None:
    """In every cycle where checks are exact, convex or not, whatever the learned optimizer does."""
    f = valleys if problem == "valleys" else CONVEX[problem]()
    start = 2.0 + 0.1 * jnp.arange(4.0 if problem == "ridge" else 6.0)
    trusted = optax.sgd(0.05) if fallback == "sgd" else optax.adam(0.1)
    alone = lossguard.unguarded(trusted, nt=NT)

    def one(which):
        guard = lossguard.loss_guard(
            optimizers.hostile(which, 0.15 if problem == "valleys" else 0.4),
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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hedge", [True, "only"])
def test_one_more_error_does_not_add_to_the_last(hedge) -> None:
    """Under noise: E f(x) <= E f(s) + 0.171 sum E tau / sqrt(nc) after any number of cycles.

    tau is the deviation of F(lane, j) - F(s, j), summed over y and z. s knows nothing of wrong
    decisions, so that only the last one counts; test_criteria has the constant.
    """
    problem, sigma, seeds, cycles, nc = CONVEX["quadratic"](), 2.0, 300, 60, 4
    learned = optimizers.hostile(1)  # wanders
    fallback = optax.sgd(0.1)
    guard = lossguard.loss_guard(learned, fallback, nt=1, nc=nc, hedge=hedge)
    branch, trusted = lossguard.unguarded(learned, nt=1), lossguard.unguarded(fallback, nt=1)
    start = jnp.zeros(6)

    def one(key):
        objective = noisy(problem, key, sigma, cycles * (1 + nc))

        def step(state, _):
            y, _ = branch.step(state._replace(inner=state.inner.lanes.learned[0]), objective)
            z = (
                y
                if hedge == "only"
                else trusted.step(state._replace(inner=fallback.init(start)), objective)[0]
            )
            state, decision = guard.step(state, objective)
            s = state.inner.lanes.own.params
            apart = jnp.linalg.norm(y.params - s)
            apart += 0 if hedge == "only" else jnp.linalg.norm(z.params - s)
            tau = sigma / 6**0.5 * apart
            regret = problem.excess(state.params) - problem.excess(s)
            return state, (regret, tau, decision.winner)

        return jax.lax.scan(step, guard.init(start), length=cycles)[1]

    regret, tau, winner = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), seeds))
    error = 3 * regret.std(axis=0) / seeds**0.5
    assert (regret.mean(axis=0) <= 0.171 * tau.mean(axis=0) / nc**0.5 + error).all()
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
        own, schedule = state.inner.lanes.own, state.inner.lanes.own.state[1]
        if cycle == 1:  # step number 5 is its last
            np.testing.assert_array_equal(own.params, state.params)
            jax.tree.map(np.testing.assert_array_equal, own.state, state.inner.lanes.fallback)
        else:
            assert (own.params != state.params).any()
        assert schedule.count == (cycle + 1) * NT
        assert state.inner.lanes.on_own == (cycle == 1)
        assert decision.reset_fallback == (cycle == 1)
        assert np.isfinite(own.params).all()
        # z coincides with s while nothing was lost, and again after s began again
        assert decision.gradients == (2 if cycle in (0, 2) else 3) * NT


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hedge": "always"}, "hedge must be False, True, 'only' or track_record(), got 'always'"),
        (
            {"learned": []},
            "the number of learned optimizers must be an integer of at least 1, got 0",
        ),
    ],
)
def test_errors(arguments, message) -> None:
    with pytest.raises(ValueError) as error:
        lossguard.loss_guard(
            **({"learned": optax.sgd(1.0), "fallback": optax.sgd(1.0)} | arguments)
        )
    assert str(error.value) == message
