"""Compiled runs of a guard, as several tests want them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optimizers import HOSTILE, constant

import lossguard


def play(guard: lossguard.Guard, objective, start, cycles: int):
    """The states after every cycle, and the decisions."""

    def step(state, _):
        state, decision = guard.step(state, objective)
        return state, (state, decision)

    return jax.jit(lambda start: jax.lax.scan(step, guard.init(start), length=cycles)[1])(start)


def over_hostile(one, others, names=HOSTILE):
    """``one(which, other)`` for each hostile optimizer, or some, and each of others, compiled."""
    which = jnp.array([HOSTILE.index(name) for name in names])
    over_others = jax.vmap(one, in_axes=(None, 0))
    return jax.jit(jax.vmap(over_others, in_axes=(0, None)))(which, others)


def relapses(guard_of, *, nt: int, share: float):
    """Two runs in which all run as much as they may, one with s below x, one with s above it.

    y moves by 1.1 / k, and the loss is exp(-w). So it falls by a power of 1.1 of k, but of 0.07 of
    the age k / 16 that y is taken for when it takes over. Once it has stood still it stalls
    whenever it is judged, and z climbs, so y wins each trial.
    When y takes over z is at -0.012, which is the start of s. The loss there is 1 and -1 in turn:
    below x's in the mean, but by too little to win a trial. Or it is far above x's.
    """
    rate = lambda k: jnp.where((k >= 220) & (k < 530), 0, 1.1 / (k + 1))  # noqa: E731
    learned = optax.chain(constant(1.0), optax.scale_by_schedule(rate))
    guard = guard_of(learned, constant(-0.001), nt=nt, share=share)

    @jax.jit
    def run(s_is_low):
        def objective(w, i):
            of_s = jnp.where(s_is_low, 1.0 - 2.0 * (i % 2), 1e6)
            return jnp.where(w < -0.0115, of_s, jnp.exp(-w))

        return play(guard, objective, jnp.float32(0), 6_000 // nt)[1]

    return (jax.tree.map(np.asarray, run(s_is_low)) for s_is_low in (True, False))


def check_price(decisions, nt: int, share: float):
    """The bounds of all runs: trials, and the price beside s.

    Returns the steps of s so far, and which part of the budget of trials was in use at most, after
    1,000 steps.
    """
    k, first = nt * np.arange(1, decisions.gradients.shape[-1] + 1), nt * -(-10 // nt)
    of_y = nt * ~np.isnan(decisions.fallback_loss)
    of_s = np.cumsum(decisions.gradients - nt - of_y, axis=-1)
    of_y, price = of_y.cumsum(axis=-1), np.cumsum(decisions.price(), axis=-1)
    for_trials = share * k + np.sqrt(k)
    assert (of_y <= np.maximum(first, for_trials)).all()
    np.testing.assert_allclose(price, k + of_s + of_y)
    return of_s, ((k > 1_000) * of_y / for_trials).max()
