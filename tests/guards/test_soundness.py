"""What counts as finite, and what replaces a state that isn't."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lossguard
from lossguard.guards.clocks import advance_schedules, keep_schedules, renew_if_unsound
from lossguard.guards.losses import Point, evaluate, sound
from lossguard.guards.soundness import all_finite, is_sound

NAN, INF = np.nan, np.inf
pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize(
    ("tree", "finite"),
    [
        ({}, True),
        ({"w": jnp.ones(2), "n": jnp.int32(3), "key": jax.random.key(0)}, True),
        ((jnp.ones(2), [jnp.array([0.0, NAN])]), False),
        (jnp.array(INF), False),
        (jnp.array(-INF), False),
        ({"w": jnp.ones(2), "b": jnp.array(NAN, jnp.bfloat16)}, False),
        (jnp.array([3e38, 3e38]), True),
        (jnp.array([INF, -INF, 1.0]), False),
        (jnp.array([1.0, complex(0, INF)]), False),
    ],
)
def test_all_finite(tree, finite) -> None:
    assert bool(all_finite(tree)) == finite


@pytest.mark.parametrize(
    ("now", "fresh", "is_so"),
    [
        (1.0, 0.0, True),
        (INF, INF, True),
        (2.0, INF, True),
        (INF, 0.0, False),
        (NAN, 0.0, False),
        (NAN, NAN, True),
    ],
)
def test_what_begins_at_infinity_or_nan_is_sound(now, fresh, is_so) -> None:
    def state(value):
        return jnp.array([0.0, value]), jnp.int32(7)

    assert bool(is_sound(state(now), lambda: state(fresh))) == is_so


def rate(k):
    return 8.0 / (1 + k)


SCHEDULED = {
    "momentum": optax.sgd(rate, momentum=0.9),
    "adam": optax.adam(rate),
    "masked": optax.masked(optax.adam(rate), {"w": True}),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    "injected integers": optax.inject_hyperparams(optax.adamw)(learning_rate=rate, weight_decay=0),
    "schedule in injected": optax.inject_hyperparams(
        lambda scale: optax.chain(optax.sgd(rate, momentum=0.9), optax.scale(scale))
    )(scale=2.0),
    "partitioned": optax.partition({"a": optax.sgd(rate, momentum=0.9)}, {"w": "a"}),
    "in MultiSteps": optax.MultiSteps(optax.sgd(rate, momentum=0.9), 1).gradient_transformation(),
}
PARAMS = {"w": jnp.array([1.0, -2.0])}


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules_are_those_of_the_one_and_memory_is_that_of_the_other(name) -> None:
    """After three steps up, the next one is a first step at the rate of the fourth; or reversed."""
    optimizer = SCHEDULED[name]
    up, down = ({"w": jnp.full(2, sign)} for sign in (1.0, -1.0))
    fresh = later = optimizer.init(PARAMS)
    for _ in range(3):
        _, later = optimizer.update(up, later, PARAMS)

    def next_step(state):
        return optimizer.update(down, state, PARAMS)[0]["w"]

    assert jnp.abs(next_step(later) / rate(3) - next_step(fresh) / rate(0)).min() > 0.1
    for state, advanced, ratio in ((fresh, later, rate(3) / rate(0)), (later, fresh, 4.0)):
        kept = keep_schedules(state, advanced)
        np.testing.assert_allclose(next_step(kept), ratio * next_step(state), rtol=1e-5)
        assert jax.tree.structure(kept) == jax.tree.structure(state)


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules_may_go_on_while_an_optimizer_is_idle(name) -> None:
    """By three steps, as if it had taken them, and its memory as it was."""
    optimizer = SCHEDULED[name]
    up = {"w": jnp.ones(2)}
    _, state = optimizer.update(up, optimizer.init(PARAMS), PARAMS)
    later, now = (
        optimizer.update(up, one, PARAMS)[0]["w"] for one in (advance_schedules(state, 3), state)
    )
    np.testing.assert_allclose(later, rate(4) / rate(1) * now, rtol=1e-5)


def test_schedules_of_idle_optimizers_stay_at_the_largest_count() -> None:
    state = optax.ScaleByScheduleState(jnp.int32(2**31 - 5))
    assert advance_schedules(state, 10).count == 2**31 - 1
    for dtype in ("int8", "int16"):  # of somebody's own
        state = optax.ScaleByScheduleState(jnp.array([3, 120], dtype))
        assert advance_schedules(state, 10).count.tolist() == [13, 127 if dtype == "int8" else 130]


def test_weight_decay_may_have_a_schedule_too() -> None:
    optimizer = optax.chain(optax.trace(0.9), optax.add_decayed_weights(rate))
    zero, fresh = {"w": jnp.zeros(2)}, optimizer.init(PARAMS)
    _, later = optimizer.update({"w": jnp.ones(2)}, fresh, PARAMS)
    decayed, _ = optimizer.update(zero, keep_schedules(fresh, later), PARAMS)
    np.testing.assert_allclose(decayed["w"], rate(1) * PARAMS["w"])


def remembers_start() -> optax.GradientTransformation:
    """Its state holds the parameters that it began with."""
    return optax.GradientTransformation(lambda params: params, lambda g, state, params=None: (g, 0))


@pytest.mark.parametrize("bad", [None, NAN, INF])
def test_an_unsound_state_begins_anew_at_the_parameters_but_for_its_schedule(bad) -> None:
    optimizer = optax.with_extra_args_support(
        optax.chain(remembers_start(), optax.trace(0.9), optax.scale_by_schedule(rate))
    )
    start, trace, schedule = optimizer.init({"w": jnp.zeros(2)})
    ones = {"w": jnp.ones(2)}
    state = (start, trace._replace(trace=ones), schedule._replace(count=jnp.int32(5)))
    spoilt = state if bad is None else (state[0], trace._replace(trace={"w": ones["w"] * bad}))
    renewed = renew_if_unsound(optimizer, PARAMS, (*spoilt[:2], state[2]))
    expected = state if bad is None else (PARAMS, trace, state[2])
    jax.tree.map(np.testing.assert_array_equal, renewed, expected)


def test_an_objective_may_return_a_python_number() -> None:
    (value, *_), gradient = evaluate(sound(lambda w, i: 1.5), Point(jnp.ones(2), None), 0)
    assert value == 1.5 and not gradient.any()


def test_an_objective_may_come_to_close_over_something_else() -> None:
    def objective(w, i):
        return jnp.sum((w - target) ** 2)

    losses = []
    for target in (1.0, 3.0):  # noqa: B007 - in the objective
        guard = lossguard.recommended(optax.sgd(0.05), optax.sgd(0.01))
        losses.append(guard.step(guard.init(jnp.zeros(1)), objective)[1].losses[0])
    assert losses == [1, 9]


def test_a_derivative_by_what_an_objective_closes_over_goes_through_guards() -> None:
    """And by the minibatches that it is given."""
    batches = jnp.linspace(1.0, 3.0, 10)

    def after(make, h, batches):
        loss = lambda w, x: jnp.sum((w - x) ** 2) + h * jnp.sum(w**2)  # noqa: E731
        guard = make(optax.sgd(0.05), optax.sgd(0.01))
        state, _ = guard.step(guard.init(jnp.zeros(2)), loss, batches)
        return jnp.sum(state.params**2)

    for make in (lossguard.recommended, lossguard.hedged):
        ours, plain = (
            jax.grad(lambda *at, one=one: after(one, *at), argnums=(0, 1))(0.1, batches)
            for one in (make, lambda learned, fallback: lossguard.unguarded(fallback))
        )
        for one, other in zip(ours, plain, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)
            assert (jnp.abs(one) > 1e-3).all()


def test_an_optimizer_may_differentiate_the_objective_forwards() -> None:
    """As Newton's method along the gradient does, for which a quadratic is one step."""

    def update(gradient, state, params=None, *, value_fn):
        def slope(rate):
            return jax.jvp(value_fn, (params - rate * gradient,), (gradient,))[1]

        now, curvature = jax.jvp(slope, (0.0,), (1.0,))
        return now / curvature * gradient, state

    newton = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    for guard in (
        lossguard.best_of([lossguard.unguarded(newton, nt=1)]),
        lossguard.recommended(newton, newton, nt=1),
    ):
        state, _ = guard.step(guard.init(jnp.ones(2)), lambda w, i: jnp.sum(w**2))
        np.testing.assert_allclose(state.params, 0, atol=1e-6)
