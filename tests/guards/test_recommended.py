"""The recommended guard is a loss guard with certain options."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import play

import lossguard
from lossguard.guards.recommended import settings
from lossguard.tasks import MLP, Task, spirals


@pytest.mark.parametrize("fallback", [optax.sgd(3.0), optax.adam(0.1)], ids=["sgd", "adam"])
def test_its_losses_sum_up_to_no_more_than_the_fallbacks(fallback: Any) -> None:
    """At any time, discounted as its record is or not: a learned optimizer on data new to it."""
    task = Task(spirals(samples=2_000), MLP())
    objective, start = task.objective(jax.random.key(1)), task.init(jax.random.key(0))
    guard = lossguard.recommended(lossguard.pretrained("lstm-mnist-mlp"), fallback)
    states, decisions = play(guard, objective, start, 40)
    _, alone = play(lossguard.unguarded(fallback, trusted=True), objective, start, 40)
    above = np.asarray(decisions.losses - alone.losses, np.float64).sum(1)
    for decay in (0.7, 1.0):
        regret = [above[: k + 1] @ decay ** np.arange(k + 1)[::-1] for k in range(40)]
        assert max(regret) <= 1e-4
    beside = (decisions.winner == 2) & ~states.inner.lanes.on_own
    assert beside.any()  # s was given out while x went on


def test_it_gives_up_after_its_patience() -> None:
    """The learned optimizer loses every cycle: x is the fallback's, and z is s."""
    hopeless, fallback = optax.sgd(-1.0), optax.sgd(0.1)
    guard = lossguard.recommended(hopeless, fallback, nt=2, nc=2, patience=3)
    _, decisions = lossguard.rollout(
        guard, guard.init(jnp.ones(2)), lambda w, i: jnp.sum(w**2), cycles=12
    )
    probed = np.asarray(decisions.learned_updates) > 0
    np.testing.assert_array_equal(np.flatnonzero(probed), [0, 1, 2, 4, 7])
    np.testing.assert_array_equal(decisions.gradients, np.where(probed, 4, 2))


def test_patience_goes_to_every_candidate() -> None:
    candidates = [optax.sgd(-1.0, momentum=0.9), optax.sgd(-2.0, momentum=0.9)]
    guard = lossguard.recommended(candidates, optax.sgd(0.1), patience=1, loser="keep")
    step = jax.jit(lambda state: guard.step(state, lambda w, i: jnp.sum(w**2)))
    state, first = step(guard.init(jnp.ones(2)))
    _, second = step(state)
    assert (first.learned_updates, second.learned_updates) == (20, 0)
    for member in state.inner.members:  # a lane that lost keeps what it knows
        (trace,) = jax.tree.leaves(member.inner.lanes.learned)
        assert jnp.abs(trace).min() > 0


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^patience must be an integer of at least 1, got 0$"):
        settings(nt=10, nc=10, most=10, patience=0)


def test_one_check_minibatch_suffices_where_there_are_never_more() -> None:
    criterion = settings(nt=10, nc=1, most=1)["criterion"]
    assert criterion.looks is None and criterion.training == 4
