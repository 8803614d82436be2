"""A guard of guards: which one it follows, and that it is never behind the best of them."""

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

NT, NC, CYCLES = 3, 2, 60
DECAY = 0.7


def problem_and_objective():
    problem = numpy_guards.Objective(seed=4, minibatches=CYCLES * (NT + NC))
    return jnp.asarray(problem.start), objective_of(problem)


def unguarded(optimizer):
    return lossguard.unguarded(optimizer, nt=NT)


def three_alone():
    """Guards of which none is the best all the time, and what each does by itself."""
    start, objective = problem_and_objective()
    members = [optax.sgd(0.02, momentum=0.95), optax.sgd(decay(0.1)), optax.sign_sgd(0.3)]
    guards = [unguarded(one) for one in members]
    return start, objective, guards, [play(guard, objective, start, CYCLES) for guard in guards]


@pytest.mark.usefixtures("x64")
def test_it_follows_the_lowest_record() -> None:
    """Against each optimizer run alone, and the rule in NumPy."""
    start, objective, guards, alone = three_alone()
    best = lossguard.best_of(guards, decay=DECAY)
    states, decisions = play(best, objective, start, CYCLES)

    losses = np.stack([np.asarray(d.losses).mean(axis=1) for _, d in alone])
    records, followed = np.zeros(len(guards)), []
    for cycle in range(CYCLES):
        records = DECAY * records + losses[:, cycle]
        followed.append(int(np.argmin(records)))
    assert set(followed) == {0, 1, 2}
    np.testing.assert_array_equal(decisions.winner, followed)
    np.testing.assert_array_equal(states.minibatches, NT * np.arange(1, CYCLES + 1))
    for cycle, one in enumerate(followed):
        single, told = alone[one]
        np.testing.assert_allclose(states.params[cycle], single.params[cycle], rtol=1e-12)
        np.testing.assert_allclose(decisions.losses[cycle], told.losses[cycle], rtol=1e-12)
    assert (decisions.gradients == len(guards) * NT).all()


@pytest.mark.usefixtures("x64")
def test_with_checks_it_follows_the_lowest_record_on_held_out_minibatches() -> None:
    """Numbers -1, -2, ..., after each cycle; training losses would often choose another one."""
    start, objective, guards, alone = three_alone()
    states, decisions = play(
        lossguard.best_of(guards, nc=NC, decay=DECAY), objective, start, CYCLES
    )

    records, on_training, followed, by_training = np.zeros(3), np.zeros(3), [], []
    for cycle in range(CYCLES):
        numbers = -1 - NC * cycle - np.arange(NC)
        ends = [kept.params[cycle] for kept, _ in alone]
        records = DECAY * records + [np.mean([objective(x, i) for i in numbers]) for x in ends]
        on_training = DECAY * on_training + [d.losses[cycle].mean() for _, d in alone]
        followed.append(int(np.argmin(records)))
        by_training.append(int(np.argmin(on_training)))
        np.testing.assert_allclose(states.params[cycle], ends[followed[-1]], rtol=1e-12)
    assert len({*followed}) > 1 and followed != by_training
    np.testing.assert_array_equal(decisions.winner, followed)
    assert (decisions.forwards == 3 * NC).all()
    with pytest.raises(ValueError, match=r"^nc must be 0 for stacked minibatches, got 2$"):
        guard = lossguard.best_of(guards, nc=2)
        batches = lossguard.stacked(
            lambda x, batch: x @ batch, jnp.ones((9, *start.shape)), start=0
        )
        guard.step(guard.init(start), batches)


def test_the_curve_is_not_above_the_best_guards() -> None:
    """Discounted sums of the reported losses, at every cycle, beside hostile optimizers too."""
    problem = numpy_guards.Objective(seed=4, minibatches=2 * CYCLES * (NT + NC))
    start = jnp.asarray(problem.start, jnp.float32)
    noise = jax.random.normal(jax.random.key(0), (5, *problem.xi.shape))
    hostile = [optimizers.hostile(j) for j in range(len(optimizers.HOSTILE))]
    fallback = optax.sgd(0.1)
    guards = [unguarded(one) for one in (fallback, optax.adam(0.3), *hostile)]
    guards += [lossguard.recommended(hostile[2], fallback, nt=NT, nc=NC)]
    guard = lossguard.best_of(guards, decay=DECAY)

    def run(xi):
        objective = objective_of(problem, xi)

        def step(carry, _):
            state, sums, kept = carry
            after, decision = guard.step(state, objective)
            # The members, once more: each from its own state, on the minibatches of the cycle.
            before = (at._replace(minibatches=state.minibatches) for at in state.inner.members)
            again = [g.step(at, objective)[1] for g, at in zip(guards, before, strict=True)]
            sums = DECAY * sums + jnp.stack([d.losses.mean() for d in again])
            kept = DECAY * kept + decision.losses.mean()
            return (after, sums, kept), (sums, kept, after.params, decision.winner)

        carry = (guard.init(start), jnp.zeros(len(guards)), jnp.float32(0))
        return jax.lax.scan(step, carry, length=2 * CYCLES)[1]

    sums, kept, x, winner = map(np.asarray, jax.jit(jax.vmap(run))(noise))
    best = np.where(np.isfinite(sums), sums, np.inf).min(axis=-1)
    assert (kept <= best + 1e-5 * np.abs(best) + 1e-5).all()
    assert np.isfinite(x).all() and not np.isfinite(sums).all()
    assert len(set(winner.ravel().tolist())) > 2


def test_members_share_minibatches() -> None:
    """One guard checks, the other doesn't: both go on after the check."""
    start, objective = problem_and_objective()
    guards = [lossguard.loss_guard(optax.adam(0.1), optax.sgd(0.1), nt=NT, nc=NC)]
    guards += [unguarded(optax.sgd(0.1))]
    states, decisions = play(lossguard.best_of(guards), objective, start, 5)
    np.testing.assert_array_equal(states.minibatches, (NT + NC) * np.arange(1, 6))
    assert (decisions.gradients == 3 * NT).all() and (decisions.forwards == 2 * NC).all()
    assert (decisions.learned_updates == 2 * NT).all()


def test_steps_are_those_of_the_cycles_that_were_followed() -> None:
    """Where windows adapt, members take different numbers of them."""
    start, objective = problem_and_objective()
    windows = lossguard.adaptive(most=4)
    guards = [
        lossguard.loss_guard(optax.sgd(rate), optax.sgd(0.1), nt=NT, nc=NC, windows=windows)
        for rate in (0.11, 0.3, 0.02)
    ]
    states, decisions = play(lossguard.best_of(guards, decay=0.3), objective, start, CYCLES // 4)
    assert len(set(decisions.winner.tolist())) > 1 and len(set(decisions.steps.tolist())) > 1
    np.testing.assert_array_equal(states.steps, np.cumsum(decisions.steps))


def test_a_list_of_one_is_the_one() -> None:
    start, objective = problem_and_objective()
    one = lossguard.recommended(optax.adam(0.4), optax.sgd(0.1), nt=NT, nc=NC)
    (state, alone), (same, both) = (
        play(guard, objective, start, CYCLES) for guard in (one, lossguard.best_of([one]))
    )
    np.testing.assert_allclose(same.params, state.params, rtol=1e-6)
    np.testing.assert_array_equal(both.used_learned, alone.used_learned)
    np.testing.assert_array_equal(both.gradients, alone.gradients)


def test_what_was_not_finite_is_not_followed() -> None:
    """Not even where it comes back, and is lower."""

    def objective(w, i):
        return jnp.where((w < -1) & (i == 2 * NT), jnp.nan, w)

    guards = [unguarded(optimizers.constant(-1.0)), unguarded(optimizers.constant(-0.01))]
    _, decisions = play(lossguard.best_of(guards), objective, jnp.float32(0), 10)
    np.testing.assert_array_equal(decisions.winner, [0, 0] + 8 * [1])


def test_a_minibatch_that_is_lost_on_all_does_not_count() -> None:
    def objective(w, i):
        return jnp.where(i == 2 * NT, jnp.nan, w)

    guards = [unguarded(optimizers.constant(-0.01)), unguarded(optimizers.constant(-1.0))]
    _, decisions = play(lossguard.best_of(guards), objective, jnp.float32(0), 10)
    assert (decisions.winner[-5:] == 1).all()


@pytest.mark.usefixtures("eager")
def test_several_recommended_are_side_by_side() -> None:
    start, objective = problem_and_objective()
    candidates, fallback = [optax.sgd(0.4), optax.sign_sgd(0.1)], optax.sgd(0.1)
    alone = [lossguard.recommended(one, fallback, nt=NT, nc=NC) for one in candidates]
    guards = [lossguard.best_of(alone), lossguard.recommended(candidates, fallback, nt=NT, nc=NC)]
    expected, found = (guard.step(guard.init(start), objective) for guard in guards)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_it_may_be_nested_and_vmapped() -> None:
    start, objective = problem_and_objective()
    inner = lossguard.best_of([unguarded(optax.adam(0.4)), unguarded(optax.sgd(0.1))])
    guard = lossguard.best_of([inner, unguarded(optax.sign_sgd(0.1))])
    starts = jnp.stack([start, 2 * start])
    states, _ = jax.vmap(lambda x: lossguard.rollout(guard, guard.init(x), objective, cycles=20))(
        starts
    )
    for one, x in zip(states.params, starts, strict=True):
        np.testing.assert_allclose(one, play(guard, objective, x, 20)[0].params[-1], rtol=1e-5)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^guards must be at least one guard, got none$"):
        lossguard.best_of([])
    with pytest.raises(ValueError, match=r"^decay must be above 0 and below 1, got 1.0$"):
        lossguard.best_of([unguarded(optax.sgd(0.1))], decay=1.0)
    with pytest.raises(ValueError, match=r"^the number of learned optimizers must be an integer"):
        lossguard.recommended([], optax.sgd(0.1))
    guard = lossguard.best_of([lossguard.unguarded(optax.sgd(0.1), nt=nt) for nt in (2, 3)])
    with pytest.raises(ValueError, match=r"^guards must have the same nt, got \[2, 3\]$"):
        guard.step(guard.init(jnp.ones(2)), lambda w, i: w.sum())


def test_records_begin_again_where_no_guards_is_finite() -> None:
    """Each guard has had a minibatch that was lost on it alone; the faster one is followed then."""

    def objective(w, i):
        lost = jnp.where(i == 1, w[0] > 0.15, (i == 3) & (w[0] < 0.1))
        return jnp.where(lost, jnp.inf, jnp.sum((w - 1) ** 2))

    slow, fast = (lossguard.unguarded(optax.sgd(rate), nt=1) for rate in (0.01, 0.1))
    guard = lossguard.best_of([slow, fast])
    _, decisions = lossguard.rollout(guard, guard.init(jnp.zeros(1)), objective, cycles=8)
    assert decisions.winner.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
