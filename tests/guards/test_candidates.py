"""Several learned lanes at once."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_guards
import optax
import optimizers
import pytest
from problems import decay, objective_of
from runs import play

import lossguard

NT, NC, CYCLES = 3, 2, 30


def played(learned, fallback, hedge):
    problem = numpy_guards.Objective(seed=4, minibatches=CYCLES * (NT + NC))
    guard = lossguard.loss_guard(learned, fallback, nt=NT, nc=NC, hedge=hedge)
    return play(guard, objective_of(problem), jnp.asarray(problem.start), CYCLES)


@pytest.mark.parametrize("hedge", [False, True, lossguard.track_record()])
def test_a_list_of_one_is_the_one(hedge) -> None:
    learned, fallback = optax.adam(0.4), optax.sgd(0.1)
    several, one = played([learned], fallback, hedge), played(learned, fallback, hedge)
    jax.tree.map(np.testing.assert_array_equal, several, one)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hedge", [False, True])
def test_a_hostile_candidate_changes_nothing(hedge) -> None:
    """Beside a good one it is as if it weren't there, but for its costs."""
    good, hostile = optax.adam(decay(0.4)), optimizers.hostile(3)  # overflows
    alone, decisions = played(good, optax.sgd(0.2), hedge)
    for learned, place in (([good, hostile], 0), ([hostile, good], 1)):
        states, both = played(learned, optax.sgd(0.2), hedge)
        np.testing.assert_allclose(states.params, alone.params, rtol=1e-12)
        np.testing.assert_array_equal(both.winner == place, decisions.winner == 0)
        assert (both.learned_updates == 2 * NT).all()
        assert both.finite_learned.all()  # any of them
    assert (decisions.winner == 0).any()
    assert (decisions.winner != 0).any()
