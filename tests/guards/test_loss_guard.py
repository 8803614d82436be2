"""What the loss guard promises beside Algorithm 2 itself: schedules, ties, and the data cursor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lossguard

LOSERS = ["keep", "reset"]


def rate(k):
    return 1.0 / (1.0 + k)


SCHEDULED = {
    "sgd": lambda: optax.sgd(rate),
    "adam": lambda: optax.adam(rate),  # on a constant gradient its step is the rate
    "chained": lambda: optax.chain(optax.identity(), optax.scale_by_learning_rate(rate)),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=rate),
    "injected adam": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    "masked": lambda: optax.masked(optax.sgd(rate), {"w": True}),
    "partitioned": lambda: optax.partition({"a": optax.sgd(rate)}, {"w": "a"}),
    "in MultiSteps": lambda: optax.MultiSteps(optax.sgd(rate), 1).gradient_transformation(),
}


@pytest.mark.parametrize("loser", LOSERS)
@pytest.mark.parametrize("fallback", SCHEDULED)
def test_schedules_advance_by_nt_a_cycle_whoever_wins(fallback, loser) -> None:
    """On F(w) = w a step of the fallback is its rate: the kept steps tell the rates used.

    The learned optimizer goes far down in even cycles, and up in odd ones, by a schedule too.
    """
    nt, cycles = 3, 6
    learned = optax.sgd(lambda k: jnp.where(jnp.asarray(k) // nt % 2 == 0, 10.0, -10.0))
    guard = lossguard.loss_guard(learned, SCHEDULED[fallback](), nt=nt, nc=1, loser=loser)
    state = guard.init({"w": jnp.array(0.0)})
    step = jax.jit(lambda state: guard.step(state, lambda params, i: params["w"]))
    for cycle in range(cycles):
        before = state.params["w"]
        state, decision = step(state)
        assert bool(decision.used_learned.all()) == (cycle % 2 == 0)
        k = np.arange(nt) + nt * cycle
        expected = nt * 10 if cycle % 2 == 0 else rate(k).sum()
        np.testing.assert_allclose(before - state.params["w"], expected, rtol=1e-4)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("loser", LOSERS)
def test_ties_go_to_the_fallback(loser) -> None:
    guard = lossguard.loss_guard(optax.sgd(0.1), optax.sgd(0.1), nt=2, nc=2, loser=loser)
    state = guard.init(jnp.ones(3))
    for _ in range(4):
        state, decision = guard.step(state, lambda w, i: jnp.sum(w**2))
        assert decision.learned_loss == decision.fallback_loss
        assert not decision.used_learned.any()
        assert decision.winner == 1


NUMBERS = 20


def trace_of(w: jax.Array, i: jax.Array) -> jax.Array:
    """F(w, i) = 2^i - w_i + max(w): exact in float32, it tells which minibatches were seen.

    Training on i adds the rate to w_i alone, and the largest w is not differentiated: the slower of
    two optimizers wins.
    """
    return 2.0**i - w[i] + jax.lax.stop_gradient(w.max())


def numbers_in(total: float) -> list[int]:
    """Which powers of 2 sum to the total."""
    return [i for i in range(NUMBERS) if int(total) >> i & 1]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("learned_rate", "fallback_rate"), [(1.0, 2.0), (2.0, 1.0)])
def test_both_lanes_see_the_same_minibatches_and_every_minibatch_is_seen_once(
    learned_rate, fallback_rate
) -> None:
    nt, nc = 3, 2
    guard = lossguard.loss_guard(optax.sgd(learned_rate), optax.sgd(fallback_rate), nt=nt, nc=nc)
    state = guard.init(jnp.zeros(NUMBERS))
    trained: list[int] = []
    for cycle in range(3):
        first = cycle * (nt + nc)
        assert state.minibatches == first
        assert state.steps == cycle * nt
        state, decision = guard.step(state, trace_of)
        trained += range(first, first + nt)
        check = list(range(first + nt, first + nt + nc))
        # The trained coordinates are at the rate of each lane, the others at 0.
        kept = 1.0
        largest = {"learned_loss": learned_rate, "fallback_loss": fallback_rate}
        for name, high in largest.items():
            high = max(high, kept if cycle else 0.0)
            assert numbers_in(float(getattr(decision, name) - high) * nc) == check
        expected = np.zeros(NUMBERS)
        expected[trained] = kept
        np.testing.assert_array_equal(state.params, expected)
        assert bool(decision.used_learned.all()) == (learned_rate < fallback_rate)
        assert decision.winner == (0 if learned_rate < fallback_rate else 1)
        seen = 2.0 ** np.arange(first, first + nt)
        np.testing.assert_array_equal(decision.losses - seen, [kept if cycle else 0, kept, kept])
