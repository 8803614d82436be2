"""What ``rewind`` promises in every run, what it leaves alone, and that it helps."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from optimizers import FAULTS, HOSTILE, Weights, faulty, hostile
from scipy import stats

import lossguard
from lossguard.rewinding import alarm as alarms

STEPS, WINDOW, RHO = 600, 64, 0.05
EXAMPLES = settings(max_examples=60, phases=[Phase.generate])  # the first that fails is enough
LOSSES = "own", "noise", "saw", "jumps", "broken", "NaN"


def losses_for(kind, value, key):
    """What the optimizer is told: its own loss, or what brings about as many returns as can be."""
    count = jnp.arange(STEPS)
    noise = jax.random.normal(key, (STEPS,))
    told = {
        "noise": jax.random.t(key, 1.5, (STEPS,)),
        "saw": jnp.where(count % 60 < 45, 0.0, 100.0) + noise,
        "jumps": jnp.exp(5 * jnp.cumsum(noise * (jax.random.uniform(key, (STEPS,)) < 0.05))),
        "broken": jnp.where(count % 48 < 30, noise, jnp.inf),
        "NaN": jnp.full(STEPS, jnp.nan),
    }
    return jnp.stack([value * jnp.ones(STEPS), *told.values()])[kind]


COUNTER = optax.GradientTransformation(
    lambda params: jnp.int32(0), lambda updates, count, params=None: (updates, count + 1)
)
"""Changes nothing, and counts the steps taken; a return sets its count back."""


def run(optimizer, kind, key):
    """After each call: the point, what there was thrown away by its own count, and COUNTER's."""
    optimizer = optax.chain(COUNTER, optimizer)
    guard = lossguard.rewind(optimizer, window=WINDOW, rho=RHO)
    start = {"w": jnp.array([3.0, -1.0]), "b": jnp.zeros(())}
    told = losses_for(kind, 0.0, key)

    def step(carry, i):
        params, state = carry
        value, gradient = jax.value_and_grad(lambda p: p["w"] @ p["w"] + p["b"] ** 2)(params)
        value = jnp.where(kind == 0, value, told[i])
        updates, state = guard.update(gradient, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state.thrown, state.inner[0])

    return jax.lax.scan(step, (start, guard.init(start)), jnp.arange(STEPS))


@jax.jit
def hostile_run(which, kind, key):
    return run(hostile(which, turn=200), kind, key)


@jax.jit
def faulty_run(which, kind, key, at, value):
    return run(faulty(0.1, at=at, fault=which, value=value), kind, key)


def check_promises(points, thrown, taken):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(points))
    assert (thrown == np.maximum(-np.diff(taken, prepend=0), 0).cumsum()).all()
    assert (thrown <= RHO * np.arange(1, STEPS + 1) + WINDOW).all()


def test_in_every_run_it_is_finite_and_throws_away_no_more_than_it_may():
    """Whatever the optimizer and the losses."""
    seen = []

    def check(play, names, *others):
        @EXAMPLES
        @given(
            which=st.sampled_from(range(len(names))),
            kind=st.sampled_from(range(len(LOSSES))),
            seed=st.integers(0, 99),
            more=st.tuples(*others),
        )
        def one(which, kind, seed, more):
            (_, state), told = jax.device_get(play(which, kind, jax.random.key(seed), *more))
            check_promises(*told)
            if play is faulty_run:
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner))
            seen.append((state.returns, state.skipped, state.unanswered, state.thrown))

        one()

    values = st.sampled_from(np.float32([np.nan, np.inf, -np.inf, 1e38, -3e38, 1e6, 1.0]))
    check(hostile_run, HOSTILE)
    check(faulty_run, FAULTS, st.integers(0, STEPS - 1), values)
    numbers = np.array(seen)
    assert (numbers > 0).any(axis=0).all()  # returns, skipped steps, alarms beyond the budget
    assert numbers[:, 3].max() > WINDOW  # and more thrown away than one window


def test_a_step_whose_memory_is_not_finite_is_skipped():
    """A square overflows; Adam would then stand still, at finite parameters."""
    guard = lossguard.rewind(optax.adam(0.1), window=WINDOW)

    def step(carry, i):
        params, state = carry
        gradient = jnp.where(i == 30, 1e25, 2 * params)
        updates, state = guard.update(gradient, state, params, value=1 / (i + 1))
        params = optax.apply_updates(params, updates)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state.inner))]
        return (params, state), jnp.array(finite).all()

    start = jnp.ones(2)
    (_, state), finite = jax.lax.scan(step, (start, guard.init(start)), jnp.arange(60))
    assert finite.all() and (state.skipped, state.returns) == (1, 0)


def false_alarms(steps: int, window: int = 256) -> float:
    """A bound on the probability of any alarm in so many steps of i.i.d. losses.

    With B = window / 4, on the event that each of the steps / B blocks has its 0.95 quantile at
    level v of the distribution at least, the score is at most a random walk that goes up with
    probability 1 - v: an excursion of it reaches B / 2 with probability ((1 - v) / v)^(B / 2). The
    threshold of the first block's last quarter may be at a lower level, but only in the second
    block unless that ends at a score above B / 8; what follows begins at that score at most.
    The ranks of the quantiles, B / 2 and B / 8 are what the alarm has.
    """
    alarm, levels = silent(window), np.linspace(0.005, 0.995, 199)
    block = alarm.block
    scores = [alarm._replace(score=jnp.int32(score)) for score in range(block)]
    limit = [bool(one.rings) for one in scores].index(True)
    calm = [bool(one.is_calm) for one in scores].index(False) - 1
    rank, early_rank = ranks(alarm)
    after_early = np.array([passes_a_block(block, 1 - v, limit, calm) for v in levels - levels[0]])
    below = stats.beta.cdf(levels, early_rank, block // 4 + 1 - early_rank)
    early = np.cumsum(after_early * np.diff(below, prepend=0))
    low = steps / block * stats.beta.cdf(levels, rank, block + 1 - rank)
    ratio = (1 - levels) / levels
    return (low + early + steps * ratio**limit + ratio ** (limit - calm)).min()


def silent(window: int) -> alarms.Alarm:
    """The alarm at the start of a run."""
    return lossguard.rewind(optax.sgd(1.0), window=window).init(jnp.zeros(1)).alarm


def ranks(alarm: alarms.Alarm) -> tuple[int, int]:
    """How many losses of a block, and of its last quarter, are at the threshold or below it.

    Blocks of 0, then of 1, have the threshold 0 if the ones are few enough.
    """
    block, ones = alarm.block, np.arange(alarm.block // 2)
    losses = (np.arange(block) >= block - ones[:, None]).astype(np.float32)
    ended = jax.vmap(lambda one: alarms.end_block(alarm._replace(losses=one)))(losses)
    return block - ones[ended.reference == 0].max(), block // 4 - ones[ended.early == 0].max()


def passes_a_block(block: int, up: float, limit: int, calm: int) -> float:
    """The probability that the score reaches the limit within a block, or isn't calm at its end."""
    at = np.zeros(limit + 1)
    at[0] = 1
    for _ in range(block):
        after = np.concatenate([[at[0] * (1 - up)], at[:-2] * up, [at[-1] + at[-2] * up]])
        after[:-2] += at[1:-1] * (1 - up)
        at = after
    return at[calm + 1 :].sum()


def test_false_alarms_are_rare_for_every_distribution():
    assert ranks(silent(256)) == (61, 16)
    assert false_alarms(10**6) < 0.001
    assert false_alarms(10**6, window=64) > 1  # no promise of so short a window


@pytest.mark.parametrize("trend", ["flat", "falls"])
def test_heavy_tails_raise_no_alarm(trend):
    steps = 50_000
    noise = np.random.default_rng(0).standard_t(1.5, steps)
    level = 0.0 if trend == "flat" else 20.0 / np.sqrt(1 + np.arange(steps))
    guard = lossguard.rewind(optax.sgd(0.0))

    @jax.jit
    def scores(losses):
        def step(state, value):
            _, state = guard.update(jnp.zeros(1), state, jnp.zeros(1), value=value)
            return state, state.alarm.score

        return jax.lax.scan(step, guard.init(jnp.zeros(1)), losses)

    state, score = scores(jnp.asarray(noise + level, jnp.float32))
    assert state.returns == state.unanswered == state.skipped == 0
    assert 1 < score.max() < 20  # of 32


def player(guard, params):
    """The state after some losses, with gradients of 1."""

    @jax.jit
    def play(values):
        def step(carry, value):
            params, state = carry
            updates, state = guard.update(jnp.ones(1), state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, guard.init(params)), values)[0]

    return lambda values: play(jnp.asarray(values, jnp.float32))


def told(guard, values, params=None):
    return player(guard, jnp.zeros(1) if params is None else params)(values)


TOLD = player(lossguard.rewind(optax.sgd(1.0)), jnp.zeros(1))


FALLS = list(np.linspace(3, 1, 256))


@pytest.mark.parametrize(
    ("values", "returns"),
    [
        ([1e30], 0),
        ([np.nan], 0),
        ([9.0] * 31 + [1.0] * 31 + [9.0] * 31, 0),
        ([9.0] * 32, 1),
        ([np.inf] * 32, 1),
        ([9.0, 9.0, 1.0] * 32, 1),
        ([9.0, 1.0] * 64, 0),
        ([1.09] * 300, 0),
    ],
)
def test_it_takes_more_losses_above_than_below(values, returns):
    _, state = TOLD(FALLS + values + [1.0] * (300 - len(values)))
    assert state.returns == returns


@pytest.mark.parametrize(("deviations", "returns"), [(2.0, 0), (4.0, 1)])
def test_it_sees_a_rise_of_four_deviations_of_the_noise(deviations, returns):
    """A minibatch's noise has the deviation 0.2; the losses had fallen by 2."""
    rng = np.random.default_rng(0)
    level = np.concatenate(
        [np.linspace(3, 1, 256), np.ones(256), np.full(64, 1 + 0.2 * deviations)]
    )
    _, state = told(lossguard.rewind(optax.sgd(1.0)), level + 0.2 * rng.standard_normal(len(level)))
    assert state.returns == returns


@pytest.mark.parametrize("at", [70, 90, 110])
def test_it_sees_a_spike_in_the_second_block_of_a_run_that_fell_within_the_first(at):
    fast = 0.5 + 2 * np.exp(-np.arange(at) / 15)
    _, state = TOLD([*fast, *[1.5] * 40])
    assert state.returns == 1 and state.last_return == at + 32


def test_rounding_is_corrected_in_a_second_call():
    """-1e8 is so far away that one update from there misses the snapshot."""
    jump = {250: -1e8}

    def update(updates, count, params=None):
        far = sum(jnp.where(count == at, by, 0.0) for at, by in jump.items())
        return jax.tree.map(lambda g: g + far, updates), count + 1

    optimizer = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    guard = lossguard.rewind(optimizer)
    start = jnp.array([0.1])
    params, state = told(guard, [*FALLS, *([9.0] * 32)], start)
    assert state.landing and state.returns == 1
    trusted = state.snapshots.trusted[0]
    assert (params != trusted).any()
    updates, after = guard.update(jnp.ones(1), state, params, value=7.0)
    assert (optax.apply_updates(params, updates) == trusted).all()
    assert not after.landing and after.calls == state.calls + 1
    unchanged = ("inner", "snapshots", "alarm", "age", "thrown", "skipped", "returns", "ramp")
    for name in unchanged:
        pairs = zip(*(jax.tree.leaves(getattr(s, name)) for s in (state, after)), strict=True)
        assert all((one == other).all() for one, other in pairs)


def test_the_way_back_from_a_huge_number_is_finite():
    """A step to above half of the largest number isn't taken: the way back might overflow."""
    largest = float(jnp.finfo(jnp.float32).max)

    def update(updates, count, params=None):
        return updates + jnp.where(count == 300, 0.97 * largest, 0.0), count + 1

    jumps = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    guard = lossguard.rewind(jumps, window=64)

    def step(carry, value):
        params, state = carry
        updates, state = guard.update(jnp.zeros(1), state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = jnp.array([-0.44 * largest])
    falls, high = jnp.linspace(3, 1, 302), jnp.full(100, 9.0)
    (_, state), points = jax.lax.scan(step, (start, guard.init(start)), jnp.append(falls, high))
    assert state.skipped > 0 and state.returns > 0
    assert (jnp.abs(points) <= largest / 2).all()


def test_a_schedule_goes_on_where_the_rest_goes_back():
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda k: 1.0))
    _, state = told(lossguard.rewind(optimizer), [*FALLS, *([9.0] * 32)])
    adam, schedule = state.inner
    assert state.returns == 1 and adam.count == 192 and schedule.count == 287


def test_an_edit_from_outside_is_honoured():
    guard = lossguard.rewind(optax.sgd(1.0))
    params, state = told(guard, FALLS)
    updates, _ = guard.update(jnp.ones(1), state, params + 7, value=1.0)
    assert optax.apply_updates(params + 7, updates) == params + 6


def test_a_mask_among_the_parameters_stays_infinite():
    optimizer = lossguard.rewind(optax.adam(0.1), window=64)
    params = {"w": jnp.ones(2), "mask": jnp.array([0.0, -jnp.inf])}

    def step(carry, loss):
        params, state = carry
        gradients = {"w": params["w"], "mask": jnp.zeros(2)}
        updates, state = optimizer.update(gradients, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    losses = jnp.concatenate([jnp.linspace(1.0, 0.1, 200), jnp.full(12, 9.0)])
    (after, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), losses)
    assert state.returns == 1 and state.skipped == 0 and not state.landing
    assert after["mask"].tolist() == [0.0, -jnp.inf] and jnp.abs(after["w"]).max() < 0.5


@partial(jax.vmap, in_axes=(None, 0))
def valley(optimizer, jump):
    """A valley in a plain that is flat far away; the rate jumps by 50 for 20 of 2,000 steps."""
    guard = optax.with_extra_args_support(optimizer)
    noise = 0.3 * jax.random.normal(jax.random.key(0), (2000, 10))

    def loss(x):
        return 1 - jnp.exp(-jnp.sum(x**2) / 10)

    def step(carry, i):
        x, state = carry
        value, gradient = jax.value_and_grad(loss)(x)
        fault = jnp.where(jump & (i >= 800) & (i < 820), 50.0, 1.0)
        updates, state = guard.update((gradient + noise[i]) * fault, state, x, value=value)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.ones(10)
    (x, state), _ = jax.lax.scan(step, (x, guard.init(x)), jnp.arange(2000))
    return loss(x), state


def trained(optimizer, params, loss_of, steps):
    """The parameters and the state after so many steps."""

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.jit(lambda start: jax.lax.scan(step, start, length=steps)[0])(start)


def test_a_state_may_be_infinite_again_where_it_was_at_the_start():
    """As a lowest loss that begins anew every ten steps."""

    def update(gradient, state, params=None, *, value, **_):
        count, lowest = state
        lowest = jnp.where(count % 10 == 9, jnp.inf, jnp.minimum(lowest, value))
        return -0.1 * gradient, (count + 1, lowest)

    start = jnp.int32(0), jnp.float32(jnp.inf)
    lowest = optax.GradientTransformationExtraArgs(lambda params: start, update)
    params, state = trained(
        lossguard.rewind(lowest), jnp.zeros(2), lambda w: jnp.sum((w - 3) ** 2), 50
    )
    assert state.skipped == 0 and jnp.abs(params - 3).max() < 1e-3


def test_a_frozen_parameter_may_be_as_low_as_its_type_goes():
    """As an additive mask, which moves nowhere, so that there is no way back."""
    params = {"w": jnp.ones(2), "mask": jnp.full(2, jnp.finfo(jnp.float32).min)}
    kinds = {"w": optax.adam(0.1), "mask": optax.set_to_zero()}
    optimizer = optax.multi_transform(kinds, {"w": "w", "mask": "mask"})
    found, state = trained(
        lossguard.rewind(optimizer), params, lambda p: jnp.sum((p["w"] - 3) ** 2), 100
    )
    assert state.skipped == 0 and jnp.abs(found["w"] - 3).max() < 0.1
    assert (found["mask"] == params["mask"]).all()


def test_parameters_may_be_of_a_class_that_compares_by_identity():
    start = Weights(jnp.ones(2))
    found, _ = trained(lossguard.rewind(optax.adam(0.1)), start, lambda p: jnp.sum(p.w**2), 9)
    assert (jnp.abs(found.w) < 1).all()


def test_after_a_jump_of_the_rate_it_recovers():
    optimizer = optax.sgd(optax.linear_schedule(0.3, 0.0, 2000))
    jump = jnp.array([False, True])
    (clean, alone), _ = valley(optimizer, jump)
    assert clean < 0.01 and alone > 0.9
    (healthy, recovered), state = valley(lossguard.rewind(optimizer), jump)
    assert recovered < 0.02 and state.returns[1] >= 1
    assert healthy == clean and state.returns[0] == 0
