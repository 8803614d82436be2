"""Several learned lanes at once."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpy_guards
import optax
import optimizers
import pytest
from problems import decay, objective_of

import lossguard

NT, NC, CYCLES = 3, 2, 30


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


@pytest.mark.parametrize("hedge", [False, True, lossguard.track_record()])
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
