"""Algorithm 2 and GL2O equal their NumPy re-implementation, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_guards
import optax
import pytest
from problems import decay, objective_of

import lossguard

CYCLES = 30


# The same optimizers twice: in NumPy, and in optax.
OPTIMIZERS = {
    "sgd": lambda: (numpy_guards.Momentum(decay(0.4)), optax.sgd(decay(0.4))),
    "momentum": lambda: (
        numpy_guards.Momentum(decay(0.3), 0.9),
        optax.sgd(decay(0.3), momentum=0.9),
    ),
    "adam": lambda: (numpy_guards.Adam(decay(0.3)), optax.adam(decay(0.3))),
    "overshooting": lambda: (
        numpy_guards.Momentum(lambda k: 1.9, 0.5),
        optax.sgd(1.9, momentum=0.5),
    ),
}


def play(guard: lossguard.Guard, problem: numpy_guards.Objective, cycles: int = CYCLES):
    """What the guard does on the same problem, cycle by cycle."""
    objective = objective_of(problem)

    step = jax.jit(lambda state: guard.step(state, objective))
    state = guard.init(jnp.asarray(problem.start))
    for _ in range(cycles):
        state, decision = step(state)
        yield state, decision


def assert_equal(got, expected, names) -> None:
    """Every cycle alike, and both decisions taken."""
    decisions = []
    for (state, decision), want in zip(got, expected, strict=True):
        np.testing.assert_allclose(state.params, want["x"], rtol=1e-9, atol=1e-12)
        for name in names:
            np.testing.assert_allclose(getattr(decision, name), want[name], rtol=1e-9, atol=1e-12)
        decisions += want["used_learned"]
    assert set(decisions) == {True, False}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("loser", "checks", "nt", "nc"),
    [
        ("keep", "next", 3, 2),
        ("rollback", "next", 3, 2),
        ("reset", "next", 3, 2),
        ("keep", "next", 1, 1),
        ("keep", "apart", 3, 2),
    ],
)
@pytest.mark.parametrize(
    ("learned", "fallback"),
    [("adam", "momentum"), ("momentum", "adam"), ("overshooting", "sgd")],
)
def test_loss_guard_is_algorithm_2(learned, fallback, loser, checks, nt, nc) -> None:
    problem = numpy_guards.Objective(seed=0, minibatches=CYCLES * (nt + nc))
    (numpy_learned, optax_learned) = OPTIMIZERS[learned]()
    (numpy_fallback, optax_fallback) = OPTIMIZERS[fallback]()
    options = {"nt": nt, "nc": nc, "loser": loser, "checks": checks}
    guard = lossguard.loss_guard(optax_learned, optax_fallback, **options)
    expected = numpy_guards.loss_guard(
        problem, numpy_learned, numpy_fallback, **options, cycles=CYCLES
    )
    names = ("used_learned", "losses", "learned_loss", "fallback_loss")
    assert_equal(play(guard, problem), expected, names)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("training", "nt", "nc"), [(2, 4, 1), (4, 4, 3), (3, 4, 0)])
def test_training_losses_count_in_the_check(training, nt, nc) -> None:
    problem = numpy_guards.Objective(seed=3, minibatches=CYCLES * (nt + nc))
    (numpy_learned, learned), (numpy_fallback, fallback) = (
        OPTIMIZERS[name]() for name in ("adam", "momentum")
    )
    options = {"nt": nt, "nc": nc, "loser": "reset", "checks": "next"}
    criterion = lossguard.mean_criterion(training=training)
    guard = lossguard.loss_guard(learned, fallback, **options, criterion=criterion)
    expected = numpy_guards.loss_guard(
        problem, numpy_learned, numpy_fallback, **options, cycles=CYCLES, training=training
    )
    names = ("used_learned", "losses", "learned_loss", "fallback_loss")
    assert_equal(play(guard, problem), expected, names)


SEQUENCES = {
    "geometric": lossguard.geometric(0.98),
    "recent_term": lossguard.recent_term(),
    "arithmetic_average": lossguard.arithmetic_average(),
    "ema": lossguard.ema(0.6),
    "recent_max": lossguard.recent_max(4),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize(
    ("learned", "fallback", "residual"),
    [("adam", "momentum", "step"), ("momentum", "adam", "step"), ("adam", "momentum", "gradient")],
)
def test_residual_guard_is_gl2o(learned, fallback, sequence, residual) -> None:
    nt = 4
    problem = numpy_guards.Objective(seed=1, minibatches=CYCLES * nt)
    (numpy_learned, optax_learned) = OPTIMIZERS[learned]()
    (numpy_fallback, optax_fallback) = OPTIMIZERS[fallback]()
    guard = lossguard.residual_guard(
        optax_learned,
        optax_fallback,
        alpha=0.99,
        sequence=SEQUENCES[sequence],
        residual=residual,
        nt=nt,
    )
    expected = numpy_guards.residual_guard(
        problem,
        numpy_learned,
        numpy_fallback,
        alpha=0.99,
        sequence=sequence,
        residual=residual,
        nt=nt,
        cycles=CYCLES,
    )
    assert_equal(play(guard, problem), expected, ("used_learned", "losses"))


def test_residual_guard_by_default_is_the_papers_setting() -> None:
    """EMA with theta = 0.9, alpha = 0.99."""
    problem = numpy_guards.Objective(seed=2, minibatches=100)
    by_default = lossguard.residual_guard(optax.adam(0.3), optax.sgd(0.3))
    named = lossguard.residual_guard(
        optax.adam(0.3), optax.sgd(0.3), alpha=0.99, sequence=lossguard.ema(0.9), nt=10
    )
    for one, other in zip(play(by_default, problem, 5), play(named, problem, 5), strict=True):
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
