"""The guards equal their NumPy re-implementation, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_guards
import numpy_relay
import optax
import pytest
from problems import decay, objective_of
from runs import play

import lossguard

CYCLES = 30


def in_phases(rate: float, other: float, steps: int):
    """A rate for so many steps, then another one, then the first again."""
    return lambda k: other + (rate - other) * (k // steps % 2 == 0)


def momentum(rate, momentum: float = 0.0):
    return lambda: (numpy_guards.Momentum(rate, momentum), optax.sgd(rate, momentum))


def adam(rate):
    return lambda: (numpy_guards.Adam(rate), optax.adam(rate))


def breaks(rate, momentum: float, at: int):
    once = optax.scale_by_schedule(lambda k: jnp.where(k == at, jnp.nan, 1.0))
    return lambda: (
        numpy_guards.Breaks(rate, momentum, at),
        optax.chain(once, optax.sgd(rate, momentum)),
    )


# The same optimizers twice: in NumPy, and in optax.
OPTIMIZERS = {
    "sgd": momentum(decay(0.4)),
    "momentum": momentum(decay(0.3), 0.9),
    "adam": adam(decay(0.3)),
    "overshooting": momentum(lambda k: 1.9, 0.5),
}


def assert_equal(guard: lossguard.Guard, problem, expected, names) -> None:
    """Every cycle alike, and both optimizers used."""
    expected = list(expected)
    start = jnp.asarray(problem.start)
    states, decisions = play(guard, objective_of(problem), start, len(expected))
    np.testing.assert_allclose(states.params, [e["x"] for e in expected], rtol=1e-9, atol=1e-12)
    for name in names:
        want = np.array([e[name] for e in expected])
        np.testing.assert_allclose(getattr(decisions, name), want, rtol=1e-9, atol=1e-12)
    assert {used for e in expected for used in e["used_learned"]} == {True, False}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("learned", "fallback", "loser", "nt", "nc"),
    [
        ("adam", "momentum", "keep", 3, 2),
        ("adam", "momentum", "reset", 3, 2),
        ("momentum", "adam", "keep", 1, 1),
        ("momentum", "adam", "reset", 3, 2),
        ("overshooting", "sgd", "keep", 3, 2),
        ("overshooting", "sgd", "reset", 1, 1),
    ],
)
def test_loss_guard_is_algorithm_2(learned, fallback, loser, nt, nc) -> None:
    problem = numpy_guards.Objective(seed=0, minibatches=CYCLES * (nt + nc))
    (numpy_learned, optax_learned) = OPTIMIZERS[learned]()
    (numpy_fallback, optax_fallback) = OPTIMIZERS[fallback]()
    options = {"nt": nt, "nc": nc, "loser": loser}
    guard = lossguard.loss_guard(optax_learned, optax_fallback, **options)
    expected = numpy_guards.loss_guard(
        problem, numpy_learned, numpy_fallback, **options, cycles=CYCLES
    )
    names = ("used_learned", "losses", "learned_loss", "fallback_loss", "winner")
    assert_equal(guard, problem, expected, names)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("loser", ["keep", "reset"])
def test_ties_go_to_the_fallback(loser) -> None:
    guard = lossguard.loss_guard(optax.sgd(0.1), optax.sgd(0.1), nt=2, nc=2, loser=loser)
    state = guard.init(jnp.ones(3))
    for _ in range(4):
        state, decision = guard.step(state, lambda w, i: jnp.sum(w**2))
        assert decision.learned_loss == decision.fallback_loss
        assert not decision.used_learned.any()
        assert decision.winner == 1


REPORTED = ("used_learned", "losses", "learned_loss", "fallback_loss", "winner", "gradients")
REPORTED += ("forwards", "learned_updates")
EVENTS = {"won", "lost", "from x", "from the snapshot", "new snapshot", "back to s"}


RELAYS = [
    (
        momentum(in_phases(0.6, -0.05, 60), 0.3),
        adam(decay(0.1)),
        10,
        3,
        EVENTS - {"back to s", "from the snapshot"},
    ),
    (
        momentum(in_phases(1.0, -0.3, 60)),
        momentum(decay(0.2)),
        10,
        1,
        EVENTS - {"back to s", "from x"},
    ),
    (
        momentum(in_phases(1.0, -0.02, 60), 0.9),
        adam(decay(0.1)),
        10,
        1,
        EVENTS - {"from the snapshot"},
    ),
    (
        momentum(in_phases(1.0, -0.02, 60), 0.3),
        momentum(decay(0.2)),
        4,
        2,
        EVENTS - {"from the snapshot", "back to s"},
    ),
    (
        momentum(in_phases(1.0, -0.3, 60)),
        breaks(decay(0.2), 0.5, at=60),  # while y leads, so that s takes this step, and z doesn't
        10,
        1,
        EVENTS - {"back to s", "from x"} | {"s breaks"},
    ),
    (
        momentum(in_phases(0.02, -0.01, 30)),
        momentum(decay(0.02)),
        10,
        4,  # a trial right after a hand-over is won by less than a tenth
        EVENTS,
    ),
]
"""Learned optimizer, fallback, nt, seed, and what can be seen in their run."""


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(("recommended", case) for case in range(len(RELAYS))),
        *(("hedged", case) for case in (0, 3, 4)),
    ],
)
def test_a_relay_is_its_rules(name, case) -> None:
    learned, fallback, nt, seed, events = RELAYS[case]
    cycles = 400
    problem = numpy_guards.Objective(seed, minibatches=cycles * nt, noise=0.05)
    (in_numpy, learned), (fallback_in_numpy, fallback) = learned(), fallback()
    options = {"nt": nt, "share": 0.3001}  # at 0.3 there are ties
    guard = getattr(lossguard, name)(learned, fallback, **options)
    reference = getattr(numpy_relay, name)
    expected = list(reference(problem, in_numpy, fallback_in_numpy, **options, cycles=cycles))
    assert_equal(guard, problem, expected, REPORTED)
    seen = {event for cycle in expected for event in cycle["events"]}
    assert seen >= events
    assert ("s catches up" if name == "recommended" else "s leads") in seen


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["recommended", "hedged"])
def test_a_fallback_that_diverges_is_left_in_the_first_trial(name) -> None:
    """Though differences that grow at each step have a standard error as large as their mean."""
    problem = numpy_guards.Objective(0, minibatches=200, noise=0.05)
    (in_numpy, learned), (fallback_in_numpy, fallback) = (
        momentum(decay(0.2))(),
        momentum(decay(3.0))(),
    )
    options = {"nt": 10, "share": 0.05}
    guard = getattr(lossguard, name)(learned, fallback, **options)
    reference = getattr(numpy_relay, name)
    expected = list(reference(problem, in_numpy, fallback_in_numpy, **options, cycles=20))
    assert_equal(guard, problem, expected, REPORTED)
    first = expected[0]
    assert "won" in first["events"] and first["losses"][-1] > 10 * first["losses"][0]
    late = [cycle["winner"] for cycle in expected[10:]]  # s begins again at x, and may be ahead
    assert (0 in late and late[-1] == 0) or name == "hedged"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("theta", "learned", "fallback", "residual", "every"),
    [
        (0.6, "adam", "momentum", "step", False),
        (1.0, "adam", "momentum", "step", False),
        (0.6, "momentum", "adam", "step", False),
        (0.6, "adam", "momentum", "gradient", False),
        (0.6, "adam", "momentum", "step", True),
    ],
)
def test_residual_guard_is_gl2o(theta, learned, fallback, residual, every) -> None:
    nt, options = 4, {"alpha": 0.99, "residual": residual}
    problem = numpy_guards.Objective(seed=1, minibatches=CYCLES * nt)
    (numpy_learned, optax_learned) = OPTIMIZERS[learned]()
    (numpy_fallback, optax_fallback) = OPTIMIZERS[fallback]()
    sequence = lossguard.ema(theta)
    sequence = sequence._replace(reject=sequence.update) if every else sequence
    guard = lossguard.residual_guard(
        optax_learned, optax_fallback, sequence=sequence, nt=nt, **options
    )
    options |= {"theta": theta, "every": every, "nt": nt, "cycles": CYCLES}
    expected = numpy_guards.residual_guard(problem, numpy_learned, numpy_fallback, **options)
    assert_equal(guard, problem, expected, ("used_learned", "losses"))


def test_a_sequence_may_be_ones_own_and_have_a_memory() -> None:
    """The largest of the residuals accepted last, as in a table of its authors."""
    largest = lossguard.TrackingSequence(
        lambda mu: (jnp.int32(0), jnp.stack([mu, mu])),
        lambda memory, r: (memory[0] + 1, jnp.stack([memory[1][1], r])),
        lambda memory: memory[1].max(),
    )
    guard = lossguard.residual_guard(optax.sgd(0.5), optax.sgd(0.1), sequence=largest, nt=3)
    state, _ = guard.step(guard.init(jnp.ones(1)), lambda w, i: w @ w / 2)
    count, two = state.inner.memory
    np.testing.assert_allclose(two, [0.025, 0.0125], rtol=1e-6)
    assert count == 3


def test_a_residual_that_is_not_finite_reaches_no_sequence() -> None:
    """Of rejected steps, which one that follows every step is told of."""
    half = lossguard.ema(0.5)
    every = half._replace(reject=half.update)
    guard = lossguard.residual_guard(optax.sgd(-1.0), optax.sgd(0.1), sequence=every, nt=1)
    state, known = guard.init(jnp.ones(1)), []
    for _ in range(3):
        state, _ = guard.step(state, lambda w, i: w @ w / jnp.where(i == 1, jnp.nan, 2))
        known.append(float(state.inner.memory))
    np.testing.assert_allclose(known, [0.1, 0.1, 0.095], rtol=1e-6)


def test_residual_guard_by_default_is_the_papers_setting() -> None:
    """EMA with theta = 0.9, alpha = 0.99."""
    problem = numpy_guards.Objective(seed=2, minibatches=100)
    by_default = lossguard.residual_guard(optax.adam(0.3), optax.sgd(0.3))
    named = lossguard.residual_guard(
        optax.adam(0.3), optax.sgd(0.3), alpha=0.99, sequence=lossguard.ema(0.9), nt=10
    )
    one, other = (
        play(guard, objective_of(problem), jnp.asarray(problem.start), 5)
        for guard in (by_default, named)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    # A first step that shrinks the residual by 1.5 % is small enough, one by 0.5 % is not.
    for rate, accepted in ((0.015, True), (0.005, False)):
        guard = lossguard.residual_guard(optax.sgd(rate), optax.sgd(0.3), nt=1)
        _, decision = guard.step(guard.init(jnp.ones(2)), lambda w, i: w @ w / 2)
        assert bool(decision.used_learned.all()) == accepted


def test_the_residual_at_y_is_of_a_step_that_is_told_the_loss_at_y() -> None:
    """Polyak's step of w^2 / 2 halves w, so that S(y) = y / 2."""
    guard = lossguard.residual_guard(optax.sgd(0.5), optax.polyak_sgd(), nt=1, alpha=0.6)
    state, decision = guard.step(guard.init(jnp.ones(1)), lambda w, i: w @ w / 2)
    assert decision.used_learned.all()
    np.testing.assert_allclose(state.inner.memory, 0.9 * 0.25 + 0.1 * 0.5, rtol=1e-6)
