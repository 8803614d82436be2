"""What ``hedged`` promises after as many steps, whatever the learned optimizer does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from problems import CONVEX, noisy, trap, valleys
from runs import check_price, over_hostile, play, relapses

import lossguard

NT, CYCLES, SEEDS = 4, 150, 4
FALLBACKS = {
    "sgd": lambda rate: optax.sgd(rate / 4),
    "momentum": lambda rate: optax.sgd(rate / 100, momentum=0.9),
    "adam": lambda rate: optax.adam(0.03),
}


def above_the_fallback(name: str, fallback: str):
    """Of each cycle the sum of reported losses less that of the fallback's own [hostile, seeds,
    cycles], and the size of the latter, and who was followed."""
    if name == "valleys":
        start, rate = jnp.array([3.0, -2.0, 0.7]), 0.1
    else:
        problem = CONVEX[name]()
        start, rate = jnp.zeros_like(problem.minimum) + 2.0, 1 / float(problem.L)
    trusted = FALLBACKS[fallback](rate)

    def objective_of(key):
        if name == "valleys":
            xi = 0.3 * jax.random.normal(key, (CYCLES * NT, *start.shape), start.dtype)
            return lambda w, i: valleys(w) + xi[i] @ w
        return noisy(problem, key, 0.3, CYCLES * NT)

    def one(which, key):
        learned = optimizers.hostile(which, rate, turn=60)
        guard = lossguard.hedged(learned, trusted, nt=NT, share=0.2)
        return play(guard, objective_of(key), start, CYCLES)[1]

    def by_itself(key):
        guard = lossguard.unguarded(trusted, nt=NT)
        return play(guard, objective_of(key), start, CYCLES)[1].losses

    keys = jax.random.split(jax.random.key(0), SEEDS)
    decisions = over_hostile(one, keys)
    alone = np.asarray(jax.jit(jax.vmap(by_itself))(keys), np.float64)
    reported = np.asarray(decisions.losses, np.float64)
    above = (reported - alone).sum(axis=-1)
    return above, np.abs(alone).sum(axis=-1), decisions


CASES = [
    ("quadratic", "sgd", True),
    ("ridge", "momentum", True),
    ("valleys", "adam", True),
    ("quadratic", "adam", False),
]


@pytest.mark.parametrize(("name", "fallback", "double"), CASES)
def test_in_no_cycle_are_its_losses_above_the_fallbacks(name, fallback, double) -> None:
    """In every run. What s does by itself is computed twice, so each may round otherwise."""
    with jax.enable_x64(double):
        above, scale, decisions = above_the_fallback(name, fallback)
    assert (above <= (1e-12 if double else 1e-5) * scale).all()
    assert (decisions.winner == 0).any() and above.min() < -1e-3 * scale.max()
    check_price(decisions, NT, 0.2)
    off_path = decisions.gradients - decisions.learned_updates > NT
    s_leads = (off_path & (decisions.winner == 2)).any()  # beside x
    assert s_leads or name == "ridge"


def test_its_price_is_that_of_x_and_s_and_of_trials() -> None:
    """s runs while x is off its path: from the first trial on, until s has been ahead for long."""
    low, high = relapses(lossguard.hedged, nt=NT, share=0.05)
    of_s, trials = check_price(low, NT, 0.05)
    assert of_s[-1] == 3 * NT and trials > 0.9
    of_s, trials = check_price(high, NT, 0.05)
    assert (of_s[3:] == NT * np.arange(1, len(of_s) - 2)).all() and trials > 0.9


def test_s_is_returned_where_x_is_worse_by_little_for_ever() -> None:
    """By 0.001 at every step, from its second cycle on."""

    def objective(w, i):
        return jnp.where(i < 10, 1 - w / 10, jnp.where(w > 0, 1.001, 1.0))

    guard = lossguard.hedged(optimizers.constant(1.0), optimizers.constant(0.0), nt=10)
    _, decisions = play(guard, objective, jnp.float32(0), 1_000)
    assert decisions.winner[0] == 0 and (decisions.losses[1:] == 1.0).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_losses_of_half_precision_are_told_and_summed_in_single_precision(dtype) -> None:
    """In their own, sums of 600 of them would be off by a percent and more."""
    start, fallback = jnp.array([3.0, -2.0, 0.7], dtype), optax.sgd(0.025)
    noise = (0.3 * jax.random.normal(jax.random.key(0), (CYCLES * NT, 3))).astype(dtype)

    def objective(w, i):
        return valleys(w) + noise[i] @ w

    _, alone = play(lossguard.unguarded(fallback, nt=NT), objective, start, CYCLES)
    learned = jax.jit(
        lambda which: play(
            lossguard.hedged(optimizers.hostile(which, 0.1, turn=60), fallback, nt=NT, share=0.2),
            objective,
            start,
            CYCLES,
        )[1]
    )
    sums = np.asarray(alone.losses, np.float64).sum(axis=1).cumsum()
    for which in range(len(optimizers.HOSTILE)):
        decisions = learned(which)
        assert decisions.losses.dtype == jnp.float32
        reported = np.asarray(decisions.losses, np.float64).sum(axis=1).cumsum()
        assert (reported - sums <= 1e-5 * np.abs(sums)).all()


def test_x_goes_on_where_s_diverges() -> None:
    """Also when sums of the losses of s overflow; then s begins again at x."""
    guard = lossguard.hedged(optax.sgd(0.02), optax.sgd(1.05))
    _, decisions = play(guard, lambda w, i: jnp.sum(w**2), jnp.ones(2), 60)
    assert (decisions.winner == 0).all() and decisions.losses[-1, -1] < 1e-15


def test_where_x_is_trapped_s_is_returned() -> None:
    """At once, though the losses that x has saved until then would pay for many cycles."""
    start, fallback = jnp.float32(-0.01), optax.sgd(0.1)
    guard = lossguard.hedged(optimizers.constant(0.1), fallback, nt=10)
    _, decisions = play(guard, trap, start, 200)
    _, alone = play(lossguard.unguarded(fallback, nt=10), trap, start, 200)
    above = np.asarray(decisions.losses - alone.losses, np.float64).sum(axis=1)
    saved = -above.cumsum()
    assert above.max() <= 1e-5 and saved.max() > 100
    assert (decisions.winner[saved > 100] == 2).any()


@pytest.mark.parametrize("name", ["recommended", "hedged"])
def test_where_the_learned_optimizer_never_wins_it_is_the_fallback(name) -> None:
    """Bit for bit."""
    problem = CONVEX["quadratic"]()
    objective = noisy(problem, jax.random.key(1), 0.3, 60 * NT)
    start = jnp.zeros_like(problem.minimum) + 2.0
    fallback = optax.adam(lossguard.harmonic_decay(0.1, offset=100.0))
    alone, told = play(lossguard.unguarded(fallback, nt=NT), objective, start, 60)

    @jax.jit
    def guarded(which):
        guard = getattr(lossguard, name)(optimizers.hostile(which), fallback, nt=NT)
        return play(guard, objective, start, 60)

    for hostile in ("ascends", "overflows", "idles"):
        states, decisions = guarded(optimizers.HOSTILE.index(hostile))
        np.testing.assert_array_equal(states.params, alone.params)
        np.testing.assert_array_equal(decisions.losses, told.losses)
        assert (decisions.winner == 2).all() and decisions.learned_updates.sum() > 0
