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
from lossguard.guards.best_of import begin_again
from lossguard.guards.losses import Point

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


def by_records(values: np.ndarray) -> list[int]:
    """Who is followed after each cycle: the lowest discounted mean of values [cycles, guards]."""
    cycles = np.arange(len(values))
    weights = np.tril(DECAY ** (cycles[:, None] - cycles).clip(0))
    return list(np.argmin(weights @ values / weights.sum(axis=1, keepdims=True), axis=1))


@pytest.mark.usefixtures("x64")
def test_it_follows_the_lowest_record() -> None:
    """Against each optimizer run alone, and the rule in NumPy."""
    start, objective, guards, alone = three_alone()
    states, decisions = play(lossguard.best_of(guards, decay=DECAY), objective, start, CYCLES)
    followed = by_records(np.stack([np.asarray(d.losses).mean(axis=1) for _, d in alone], axis=1))
    assert set(followed) == {0, 1, 2}
    np.testing.assert_array_equal(decisions.winner, followed)
    np.testing.assert_array_equal(states.minibatches, NT * np.arange(1, CYCLES + 1))
    for cycle, one in enumerate(followed):
        single, told = alone[one]
        np.testing.assert_allclose(states.params[cycle], single.params[cycle], rtol=1e-12)
        np.testing.assert_allclose(decisions.losses[cycle], told.losses[cycle], rtol=1e-12)
    assert (decisions.gradients == len(guards) * NT).all()


@pytest.mark.usefixtures("x64")
def test_with_a_check_it_follows_the_lowest_record_on_held_out_minibatches() -> None:
    """Training losses would often choose another one."""
    start, objective, guards, alone = three_alone()
    other = objective_of(numpy_guards.Objective(seed=5, minibatches=CYCLES * NC, noise=0.2))
    guard = lossguard.best_of(guards, check=other, nc=NC, decay=DECAY)
    states, decisions = play(guard, objective, start, CYCLES)
    ends = np.stack([kept.params for kept, _ in alone], axis=1)
    checks = [
        [np.mean([other(x, NC * cycle + j) for j in range(NC)]) for x in ends[cycle]]
        for cycle in range(CYCLES)
    ]
    followed = by_records(np.array(checks))
    assert len({*followed}) > 1
    assert followed != by_records(np.stack([d.losses.mean(axis=1) for _, d in alone], axis=1))
    np.testing.assert_array_equal(decisions.winner, followed)
    np.testing.assert_allclose(states.params, ends[np.arange(CYCLES), followed], rtol=1e-12)
    assert (decisions.forwards == 3 * NC).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("share", [0.0, 0.071, 0.31])
def test_with_a_share_only_the_leader_runs_in_every_cycle(share) -> None:
    """After 100 steps, in which all run: against the rule in plain loops.

    A path has a loss for each of its own cycles.
    """
    problem = numpy_guards.Objective(seed=4, minibatches=1, noise=0.0)
    start, first = jnp.asarray(problem.start), objective_of(problem)
    stalls = optax.sgd(lambda k: jnp.where(k < 4 * NT, 0.3, 0.0))
    guards = [unguarded(one) for one in (stalls, optax.sgd(0.2), optax.sign_sgd(0.1))]

    def objective(w, i):
        return first(w, 0)

    cycles, half, head_start = 120, 17, 34  # after 51 steps, and 102
    alone = [play(guard, objective, start, cycles) for guard in guards]
    best = lossguard.best_of(guards, share=share, decay=DECAY)
    states, decisions = play(best, objective, start, cycles)

    own, spent = np.zeros(3, int), np.zeros(3, int)
    sums, weights, leader = np.zeros(3), np.zeros(3), 0
    for cycle in range(cycles):
        due = share * (NT * cycle - 100)
        ran = [j for j in range(3) if j == leader or cycle < head_start or NT * spent[j] <= due]
        for j in ran:
            sums[j] = DECAY * sums[j] + alone[j][1].losses[own[j]].mean()
            weights[j] = DECAY * weights[j] + 1
            own[j] += 1
            spent[j] += cycle >= head_start - 1 and j != leader  # the last of it counts
        leader = min(ran, key=lambda j: sums[j] / weights[j])
        if cycle == half - 1:
            sums[:], weights[:] = 0, 0
        assert decisions.winner[cycle] == leader
        assert decisions.gradients[cycle] == NT * len(ran)
        expected = alone[leader][0].params[own[leader] - 1]
        np.testing.assert_allclose(states.params[cycle], expected, rtol=1e-12)
    winners, k = np.asarray(decisions.winner), NT * cycles
    assert len({*winners}) > 1
    most = 100 + NT + share * (k - 100)
    taken = [member.steps[-1] for member in states.inner.members]
    assert all(taken[j] <= most for j in range(3) if j not in winners[head_start:])
    assert decisions.gradients.sum() <= k + 3 * most


def test_a_bad_start_is_forgotten_within_the_head_start() -> None:
    """One that stands still for 30 steps, and then is a little lower, is followed after 50."""
    fast, slow = (
        optax.sgd(lambda k, at=at, by=by: jnp.where(k == at, by, 0.0))
        for at, by in ((0, 100.0), (30, 101.0))
    )
    guards = [unguarded(fast), unguarded(slow)]
    winners = {}
    for share in (None, 0.05):
        guard = lossguard.best_of(guards, share=share)
        winners[share] = play(guard, lambda w, i: w, jnp.float32(0), 50)[1].winner
    assert (winners[0.05][:17] == 0).all() and (winners[0.05][17:] == 1).all()
    assert (winners[None][:40] == 0).all()


def test_turns_before_there_was_a_share_are_not_counted() -> None:
    """Nor do those of one that begins again come back."""
    guards = [unguarded(optax.sgd(0.1)), unguarded(optax.sgd(0.01))]
    state = lossguard.best_of(guards).init(jnp.float32(1))
    state, _ = lossguard.rollout(lossguard.best_of(guards), state, lambda w, i: w**2, cycles=60)
    assert state.inner.spent.tolist() == [0, 0]
    shared = lossguard.best_of(guards, share=0.1)
    state, _ = lossguard.rollout(shared, shared.init(jnp.float32(1)), lambda w, i: w**2, cycles=60)
    again = begin_again(shared, Point(jnp.float32(3), None), state)
    assert again.params == 3 and again.inner.spent.tolist() == state.inner.spent.tolist() != [0, 0]


def test_the_curve_is_not_above_the_best_guards() -> None:
    """Sums of the reported losses, discounted as the records are, or less, or not at all.

    At every cycle, beside hostile optimizers too. Who follows the last cycle alone is above.
    """
    problem = numpy_guards.Objective(seed=4, minibatches=2 * CYCLES * (NT + NC))
    start = jnp.asarray(problem.start, jnp.float32)
    noise = jax.random.normal(jax.random.key(0), (5, *problem.xi.shape))
    hostile = [optimizers.hostile(j) for j in range(len(optimizers.HOSTILE))]
    fallback = optax.sgd(0.1)
    guards = [unguarded(one) for one in (fallback, optax.adam(0.3), *hostile)]
    guards += [lossguard.loss_guard(hostile[2], fallback, nt=NT, nc=NC)]
    guard = lossguard.best_of(guards, decay=DECAY)
    decays = jnp.array([DECAY, (1 + DECAY) / 2, 1.0])

    def run(xi):
        objective = objective_of(problem, xi)

        def step(carry, _):
            state, sums, kept = carry
            after, decision = guard.step(state, objective)
            # The members, once more: each from its own state, on the minibatches of the cycle.
            before = (at._replace(minibatches=state.minibatches) for at in state.inner.members)
            ends, again = zip(
                *(g.step(at, objective) for g, at in zip(guards, before, strict=True)), strict=True
            )
            lost = jnp.stack([~jnp.isfinite(end.params).all() for end in ends])
            losses = jnp.stack([d.losses.mean() for d in again])
            sums = decays[:, None] * sums + jnp.where(lost, jnp.inf, losses)  # it begins anew then
            kept = decays * kept + decision.losses.mean()
            return (after, sums, kept), (sums, kept, after.params, decision.winner)

        carry = (guard.init(start), jnp.zeros((len(decays), len(guards))), 0 * decays)
        return jax.lax.scan(step, carry, length=2 * CYCLES)[1]

    sums, kept, x, winner = map(np.asarray, jax.jit(jax.vmap(run))(noise))
    best = np.where(np.isfinite(sums), sums, np.inf).min(axis=-1)
    assert (kept <= best + 1e-5 * np.abs(best) + 1e-5).all()
    assert np.isfinite(x).all() and not np.isfinite(sums).all()
    assert len(set(winner.ravel().tolist())) > 2


def test_the_first_cycle_counts_as_much_as_any_other() -> None:
    """Two guards that swap places after it: whoever led at first is left at once."""

    def objective(w, i):
        late = i >= NT
        return jnp.where(late, w, -w) + 0 * i

    steps = [optimizers.constant(0.0), optimizers.constant(0.0)]
    guards = [unguarded(one) for one in steps]
    guard = lossguard.best_of(guards, decay=0.9)
    state = guard.init(jnp.float32(0))
    members = tuple(
        at._replace(params=jnp.float32(w))
        for at, w in zip(state.inner.members, (1, 0), strict=True)
    )
    state = state._replace(params=jnp.float32(1), inner=state.inner._replace(members=members))
    _, decisions = lossguard.rollout(guard, state, objective, cycles=4)
    assert decisions.winner.tolist() == [0, 1, 1, 1]  # its sums: -1, then -0.9 + 1, and so on


def test_it_tells_whether_it_follows_a_trusted_member() -> None:
    """Both are the same optimizers as without ``trusted``, under other names."""
    start, objective = problem_and_objective()
    bold, careful = optax.adam(0.4), optax.sgd(0.1)
    trusted = lossguard.unguarded(careful, nt=NT, trusted=True)
    (_, plain), (_, told) = (
        play(lossguard.best_of([unguarded(bold), one]), objective, start, CYCLES)
        for one in (unguarded(careful), trusted)
    )
    np.testing.assert_array_equal(told.losses, plain.losses)
    assert len(set(told.winner.tolist())) == 2 and plain.used_learned.all()
    np.testing.assert_array_equal(told.used_learned, np.repeat(told.winner[:, None] == 0, NT, 1))
    assert (told.learned_updates == NT).all() and (plain.learned_updates == 2 * NT).all()


@pytest.mark.parametrize("check", [None, lambda w, i: jnp.sum(w**2)])
def test_a_guard_whose_end_is_not_finite_is_not_followed(check) -> None:
    """Its losses, which are taken before the steps, are the lower ones."""
    explodes = optax.sgd(lambda t: jnp.where(t % NT == NT - 1, jnp.inf, 0.4))
    guards = [unguarded(explodes), unguarded(optax.sgd(0.01))]
    states, decisions = play(
        lossguard.best_of(guards, check=check), lambda w, i: jnp.sum(w**2), jnp.ones(2), 3
    )
    np.testing.assert_array_equal(decisions.winner, 3 * [1])
    np.testing.assert_allclose(states.params[-1], 0.98 ** (3 * NT) * np.ones(2), rtol=1e-5)


def test_what_was_not_finite_begins_again_where_the_followed_one_is() -> None:
    """It loses cycle 2, begins again at x with the record that x has, and is ahead from there.

    Its rate, which is 2 from the fourth cycle on, goes on.
    """
    rate = optax.sgd(lambda t: jnp.where(t < 3 * NT, 1.0, 2.0))

    def objective(w, i):
        return jnp.where((w < -1) & (i == 2 * NT), jnp.nan, w)

    guards = [unguarded(rate), unguarded(optimizers.constant(-0.01))]
    states, decisions = play(lossguard.best_of(guards), objective, jnp.float32(0), 5)
    np.testing.assert_array_equal(decisions.winner, [0, 0, 1, 0, 0])
    np.testing.assert_allclose(states.params, [-3, -6, -0.09, -6.09, -12.09], rtol=1e-5)
    np.testing.assert_array_equal(states.inner.members[0].steps, NT * np.arange(1, 6))


def test_a_guard_that_begins_again_gets_no_budget_anew() -> None:
    """What it may spend on trials, and on the fallback by itself, is a part of the whole run."""
    relay = lossguard.recommended(optax.sgd(1e-6), optax.sgd(1e-3), nt=NT)
    outer = lossguard.best_of([unguarded(optax.sgd(1e-3)), lossguard.best_of([relay])])
    state, objective = outer.init(jnp.ones(2)), lambda w, i: jnp.sum(w**2)
    state, _ = lossguard.rollout(outer, state, objective, cycles=100, most=100)
    alone, nested = state.inner.members
    broken = nested._replace(params=jnp.full(2, jnp.nan))
    state = state._replace(inner=state.inner._replace(members=(alone, broken)))
    copy = jax.tree.map(jnp.copy, state)
    again, decisions = lossguard.rollout(outer, copy, objective, cycles=1, most=100)
    (spent,), (kept,) = (at.inner.members[1].inner.members for at in (state, again))
    assert decisions.winner == 0 and kept.steps == spent.steps + NT
    assert kept.inner.relay.trial_cost >= spent.inner.relay.trial_cost > 0
    assert kept.inner.own_steps >= spent.inner.own_steps > 0


def test_schedules_follow_the_steps_of_the_run_where_a_guard_does_not_run() -> None:
    rate = optax.sgd(lambda t: 0.1)
    guards = [unguarded(optimizers.constant(-1.0)), unguarded(rate)]
    states, _ = play(lossguard.best_of(guards, share=0.05), lambda w, i: w, jnp.float32(0), 90)
    idle = states.inner.members[1]
    assert idle.steps[-1] < 50 * NT
    assert [int(one.count[-1]) for one in idle.inner if one._fields == ("count",)] == [90 * NT]


def test_it_may_be_nested() -> None:
    """The outer one follows the inner one, which follows its second."""
    start, objective = problem_and_objective()
    inner = lossguard.best_of([unguarded(optax.sgd(0.1)), unguarded(optax.adam(0.4))])
    guard = lossguard.best_of([unguarded(optax.sgd(1e-4)), inner])
    states, decisions = play(guard, objective, start, 20)
    alone, chosen = play(inner, objective, start, 20)
    assert (decisions.winner[1:] == 1).all() and (chosen.winner == 1).all()
    np.testing.assert_allclose(states.params[1:], alone.params[1:], rtol=1e-5)


def test_where_no_guard_is_finite_x_stays() -> None:
    """All break in the second step, and begin again where x was."""
    breaks = [
        optimizers.faulty(rate, at=1, fault="parameters", value=jnp.nan) for rate in (0.01, 0.1)
    ]
    guard = lossguard.best_of([lossguard.unguarded(one, nt=1) for one in breaks])
    states, decisions = play(guard, lambda w, i: jnp.sum((w - 1) ** 2), jnp.zeros(1), 4)
    assert decisions.winner.tolist() == [0, -1, 0, 1]
    np.testing.assert_allclose(states.params[:, 0], [0.02, 0.02, 0.0396, 0.3728], rtol=1e-5)
    np.testing.assert_array_equal(states.inner.members[1].params[1], states.params[1])


@pytest.mark.parametrize("share", [None, 0.1])
def test_a_leader_that_breaks_once_goes_back_to_where_the_cycle_began(share) -> None:
    """Of a hundred cycles one is lost; the other one is far behind."""
    breaks = optimizers.faulty(0.1, at=40 * NT + 1, fault="parameters", value=jnp.nan)
    guards = [unguarded(breaks), unguarded(optax.sgd(1e-4))]
    states, decisions = play(
        lossguard.best_of(guards, share=share), lambda w, i: jnp.sum(w**2), 1e9 * jnp.ones(2), 50
    )
    np.testing.assert_array_equal(decisions.winner, 40 * [0] + [-1] + 9 * [0])
    np.testing.assert_array_equal(states.params[40], states.params[39])
    np.testing.assert_allclose(states.params[-1], 1e9 * 0.8 ** (49 * NT) * np.ones(2), rtol=1e-4)


def test_a_leader_that_is_lost_where_its_cycle_begins_is_left() -> None:
    """It is finite but for its losses, from the first of a cycle on."""
    leaps = optax.sgd(lambda t: jnp.where(t == 4 * NT - 1, -100.0, 1.0))
    guards = [unguarded(leaps), unguarded(optax.sgd(0.01))]

    def objective(w, i):
        return jnp.where(w > 10, jnp.inf, w)

    _, decisions = play(lossguard.best_of(guards), objective, jnp.float32(0), 6)
    np.testing.assert_array_equal(decisions.winner, [0, 0, 0, 0, 1, 0])


@pytest.mark.parametrize("share", [None, 0.2])
def test_one_that_is_ruined_begins_again_at_the_leader(share) -> None:
    """It leads for five cycles, leaps far back, and moves no more; being behind is no ruin."""
    ruined = optax.sgd(lambda t: jnp.where(t < 5 * NT, 1.0, jnp.where(t == 5 * NT, -500.0, 0.0)))
    guards = [unguarded(ruined), unguarded(optax.sgd(0.5))]
    states, decisions = play(
        lossguard.best_of(guards, share=share), lambda w, i: w, jnp.float32(0), 80
    )
    at = np.asarray(states.inner.members[0].params)
    moves = np.flatnonzero(np.diff(at[6:])) + 7
    assert (at[6] > 400) and len(moves) == 1 and (decisions.winner[-60:] == 1).all()
    assert at[moves[0]] == states.params[moves[0]]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, {"share": 0.1}, {"check": lambda w, i: wide(w, i)}])
def test_losses_may_be_wider_than_the_parameters(options) -> None:
    guards = [unguarded(optax.adam(0.1)), unguarded(optax.sgd(0.01))]
    guard = lossguard.best_of(guards, **options)
    state, decisions = lossguard.rollout(guard, guard.init(jnp.zeros(3, "float32")), wide, cycles=3)
    assert decisions.losses.dtype == state.inner.records.dtype == jnp.float64
    assert decisions.losses[-1, -1] < decisions.losses[0, 0]


def wide(w, i):
    return ((w.astype("float64") - 1) ** 2).sum()
