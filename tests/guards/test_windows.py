"""Adaptive windows: sizes against NumPy, inside a loop that is compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_guards
import optax
import optimizers
import pytest
from problems import objective_of
from runs import play, side_by_side

import lossguard

NT, NC, CYCLES = 3, 2, 25


def next_factor(factor: int, y: np.ndarray, z: np.ndarray, most: int, apart: float) -> int:
    """The docstring of ``adaptive``, executed."""
    gap = abs(y.mean() - z.mean())
    spread = (y.std(ddof=1) + z.std(ddof=1)) if len(y) > 1 else 0.0
    if gap < spread:
        return min(2 * factor, most)
    if gap > apart * spread:
        return max(factor // 2, 1)
    return factor


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("most", "apart"), [(16, 2.0), (5, 1.0), (1, 3.0)])
def test_the_rule(most, apart) -> None:
    """All three ways, from every factor, and losses from n on don't count."""
    windows = lossguard.adaptive(most=most, apart=apart)
    rng = np.random.default_rng(0)
    update = jax.jit(windows.update)
    moves = set()
    for _ in range(200):
        factor, n = int(rng.integers(1, most + 1)), int(rng.integers(1, 13))
        y = rng.standard_normal(12) + rng.uniform(-8, 8)
        z = rng.standard_normal(12)
        y[n:], z[n:] = 1e6, -1e6
        got = update(jnp.int32(factor), jnp.asarray(y), jnp.asarray(z), jnp.int32(n))
        assert got == next_factor(factor, y[:n], z[:n], most, apart)
        assert 1 <= got <= most
        moves.add(int(np.sign(got - factor)))
    assert moves == ({-1, 0, 1} if most > 1 else {0})
    assert update._cache_size() == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_change_nothing(bad) -> None:
    windows, n = lossguard.adaptive(), jnp.int32(3)
    good, spoilt = jnp.arange(3.0), jnp.array([0.0, bad, 1.0])
    for y, z in ((good, spoilt), (spoilt, good), (spoilt, spoilt)):
        assert windows.update(jnp.int32(4), y, z, n) == 4


def test_lanes_that_coincide_change_nothing() -> None:
    """On a deterministic objective: no gap and no spread."""
    losses = jnp.full(3, 2.0)
    assert lossguard.adaptive().update(jnp.int32(4), losses, losses, jnp.int32(3)) == 4


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"most": 0}, "most must be an integer of at least 1, got 0"),
        ({"most": 2.5}, "most must be an integer of at least 1, got 2.5"),
        ({"apart": 0.5}, "apart must be at least 1, got 0.5"),
        ({"apart": float("nan")}, "apart must be at least 1, got nan"),
    ],
)
def test_errors(arguments, message) -> None:
    with pytest.raises(ValueError) as error:
        lossguard.adaptive(**arguments)
    assert str(error.value) == message


def test_one_check_has_no_deviation_to_adapt_by() -> None:
    one = optax.sgd(1.0)
    with pytest.raises(ValueError, match=r"^nc must be at least 2 where windows adapt, got 1$"):
        lossguard.loss_guard(one, one, nc=1, windows=lossguard.adaptive())
    lossguard.loss_guard(one, one, nc=1, windows=lossguard.adaptive(most=1))
    more = lossguard.sequential_criterion()  # which has its own
    lossguard.loss_guard(one, one, nc=1, windows=lossguard.adaptive(), criterion=more)


# Far from the minimum the faster optimizer is clearly ahead; near it noise decides, until after 150
# steps the learned one diverges.
MOST = 5
FALLBACK = 0.1


def learned_rate(k: jax.Array | int) -> jax.Array:
    return jnp.where(k < 150, 0.9, 4.0)


def guard(windows=None) -> lossguard.Guard:
    windows = lossguard.adaptive(most=MOST) if windows is None else windows
    return lossguard.loss_guard(
        optax.sgd(learned_rate), optax.sgd(FALLBACK, momentum=0.5), nt=NT, nc=NC, windows=windows
    )


def minibatches() -> int:
    return CYCLES * (NT + NC) * MOST


def by_numpy(problem: numpy_guards.Objective):
    """Algorithm 2 with windows that adapt."""
    learned = numpy_guards.Momentum(lambda k: float(learned_rate(k)))
    fallback = numpy_guards.Momentum(lambda k: FALLBACK, 0.5)
    x, i, factor = problem.start, 0, 1
    for _ in range(CYCLES):
        nt, nc = NT * factor, NC * factor
        y, z, losses = x, x, ([], [])
        for t in range(nt):
            losses[0].append(problem.loss(y, i + t))
            losses[1].append(problem.loss(z, i + t))
            y = learned.step(y, problem.gradient(y, i + t))
            z = fallback.step(z, problem.gradient(z, i + t))
        checks = [np.array([problem.loss(w, i + nt + j) for j in range(nc)]) for w in (y, z)]
        won = checks[0].mean() < checks[1].mean()
        x = y if won else z
        i += nt + nc
        yield {
            "x": x,
            "steps": nt,
            "losses": losses[0 if won else 1],
            "won": won,
            "minibatches": i,
            "forwards": 2 * nc,
        }
        factor = next_factor(factor, *checks, MOST, 2.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_is_numpys_and_compiled_once(seed) -> None:
    problem = numpy_guards.Objective(seed, minibatches(), n=4, noise=1.0)
    objective = objective_of(problem)
    adapting = guard()
    step = jax.jit(lambda state: adapting.step(state, objective))
    state = adapting.init(jnp.asarray(10 * problem.start))
    problem.start = 10 * problem.start
    steps, k = [], 0
    for expected in by_numpy(problem):
        state, decision = step(state)
        k += expected["steps"]
        np.testing.assert_allclose(state.params, expected["x"], rtol=1e-9, atol=1e-12)
        assert decision.steps == expected["steps"]
        assert state.steps == k
        assert state.minibatches == expected["minibatches"]
        # losses and flags fill the first ``steps`` places of nt times the largest factor
        losses, used = np.asarray(decision.losses), np.asarray(decision.used_learned)
        assert losses.shape == used.shape == (NT * MOST,)
        np.testing.assert_allclose(losses[: expected["steps"]], expected["losses"], rtol=1e-9)
        assert np.isnan(losses[expected["steps"] :]).all()
        assert (used[: expected["steps"]] == expected["won"]).all()
        assert not used[expected["steps"] :].any()
        # costs: nt and nc grow together
        assert decision.gradients == 2 * expected["steps"]
        assert decision.learned_updates == expected["steps"]
        assert decision.forwards == expected["forwards"]
        assert decision.forwards * NT == 2 * expected["steps"] * NC
        steps.append(expected["steps"])
    assert step._cache_size() == 1
    assert {1, MOST} <= set(np.array(steps) // NT)
    assert (np.diff(steps) > 0).any()
    assert (np.diff(steps) < 0).any()


@pytest.mark.usefixtures("x64")
def test_vmap_is_a_loop() -> None:
    """Seeds whose windows differ in the same cycle don't disturb each other."""
    problem = numpy_guards.Objective(0, 1, n=4)
    xi = jax.random.normal(jax.random.key(0), (6, minibatches(), 4))
    starts = jnp.asarray(problem.m) + jnp.array([0.0, 0.3, 1, 3, 10, 30])[:, None]
    adapting = guard()

    def run(start, xi):
        objective = objective_of(problem, xi)
        return jax.lax.scan(
            lambda state, _: adapting.step(state, objective), adapting.init(start), length=CYCLES
        )

    states, decisions = side_by_side(run, starts, xi)
    steps = np.asarray(decisions.steps)
    assert (steps.min(axis=0) < steps.max(axis=0)).any()
    assert len(np.unique(states.minibatches)) > 1


def test_fixed_windows_are_the_default() -> None:
    problem = numpy_guards.Objective(0, minibatches(), n=4, noise=1.0)
    objective = objective_of(problem, jnp.asarray(problem.xi, jnp.float32))
    default = lossguard.loss_guard(
        optax.sgd(learned_rate), optax.sgd(FALLBACK, momentum=0.5), nt=NT, nc=NC
    )
    states = [one.init(jnp.asarray(problem.start, jnp.float32)) for one in (guard(), default)]
    for windows in (lossguard.fixed(), lossguard.adaptive(most=1)):
        one, other = guard(windows), default
        steps = [jax.jit(lambda s, g=g: g.step(s, objective)) for g in (one, other)]
        pair = list(states)
        for _ in range(5):
            pair, decisions = zip(
                *(step(state) for step, state in zip(steps, pair, strict=True)), strict=True
            )
        np.testing.assert_array_equal(pair[0].params, pair[1].params)
        assert decisions[0].losses.shape == decisions[1].losses.shape == (NT,)


def test_windows_and_the_sequential_criterion() -> None:
    """nt alone adapts: the test itself says how many check minibatches it takes."""
    criterion = lossguard.sequential_criterion(first=2, most=8)
    both = lossguard.loss_guard(
        optax.sgd(learned_rate),
        optax.sgd(FALLBACK),
        nt=NT,
        nc=NC,
        windows=lossguard.adaptive(most=4),
        criterion=criterion,
    )

    def objective(w, i):
        return w @ w / 2 + jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (3,)) @ w

    step = jax.jit(lambda state: both.step(state, objective))
    state, seen, lengths = both.init(jnp.full(3, 100.0)), 0, set()
    for _ in range(20):
        state, decision = step(state)
        assert int(decision.forwards) // 2 in criterion.looks
        assert decision.steps in (NT, 2 * NT, 4 * NT)
        seen += int(decision.steps + decision.forwards // 2)
        assert state.minibatches == seen
        lengths.add((int(decision.steps), int(decision.forwards)))
    assert len({steps for steps, _ in lengths}) > 1
    assert len({forwards for _, forwards in lengths}) > 1


def level(w, i):
    """Noise that lanes share, and that is wide: they can't be told apart."""
    return w @ w / 2 + jax.random.normal(jax.random.fold_in(jax.random.key(0), i))


@pytest.mark.parametrize("rates", [(0.1, -3.0), (-3.0, 0.1)])
def test_windows_adapt_by_the_best_learned_lane(rates) -> None:
    guard = lossguard.loss_guard(
        [optax.sgd(rate) for rate in rates],
        optax.sgd(0.1),
        nt=2,
        nc=3,
        windows=lossguard.adaptive(most=4),
    )
    _, decisions = play(guard, level, jnp.ones(2), 3)
    np.testing.assert_array_equal(decisions.steps, [2, 4, 8])


def test_windows_adapt_by_the_best_lane_of_the_fallback() -> None:
    """After the first cycle s, which is level with the learned lane, where z is far behind."""

    def objective(w, i):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i))
        return jnp.where(i < 4, -w[0], jnp.where(w[0] == 1, 100.0, 0.0) + noise)

    guard = lossguard.loss_guard(
        optimizers.constant(1.0),
        optax.sgd(0.0),
        nt=1,
        nc=3,
        hedge=True,
        windows=lossguard.adaptive(most=4),
    )
    _, decisions = play(guard, objective, jnp.zeros(1), 3)
    np.testing.assert_array_equal(decisions.winner[:2], [0, 2])
    np.testing.assert_array_equal(decisions.steps, [1, 1, 2])


def test_windows_keep_their_factor_while_the_learned_lane_waits() -> None:
    guard = lossguard.loss_guard(
        optax.sgd(0.1),
        optax.sgd(0.1),
        nt=2,
        nc=3,
        windows=lossguard.adaptive(most=8),
        probing=lossguard.backoff(patience=1, most=1),
    )
    _, decisions = play(guard, level, jnp.ones(2), 5)
    np.testing.assert_array_equal(decisions.steps, [2, 4, 4, 8, 8])


def test_the_last_training_losses_count_in_a_window_of_any_length() -> None:
    """The loss on minibatch i is i, so that the mean says which were compared."""
    windows, criterion = lossguard.adaptive(most=4), lossguard.mean_criterion(training=2)
    guard = lossguard.loss_guard(
        optax.sgd(0.1), optax.sgd(0.1), nt=NT, nc=NC, windows=windows, criterion=criterion
    )
    _, decisions = play(guard, lambda w, i: 0 * w.sum() + i, jnp.ones(2), 4)
    first = 0
    for steps, mean in zip(decisions.steps, decisions.learned_loss, strict=True):
        end = first + steps + NC * (steps // NT)
        assert mean == jnp.arange(first + steps - 2, end).mean()
        first = end
    assert decisions.steps.tolist() == [3, 6, 12, 12]
