"""``rewind`` step by step against the rule in plain Python: both are exact, to the last bit."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from numpy_rewind import KINDS, OPTIONS, Run, losses_of

import lossguard

RATE = 0.25


def turning() -> optax.GradientTransformation:
    """SGD at a rate that depends on how often it was called: state that a return must restore."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -RATE * (1 + state) * g, updates), (state + 1) % 3

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


@partial(jax.jit, static_argnames="which")
def play(losses, gradients, start, which):
    """Where it is before each step and what it tells, and the last parameters and state."""
    optimizer = lossguard.rewind(turning(), **OPTIONS[which])

    def step(carry, given):
        params, state = carry
        loss, gradient = given
        updates, state = optimizer.update(gradient, state, params, value=loss)
        told = state.returns, state.unanswered, state.thrown, state.skipped
        told += state.scale, state.alarm.score
        return (optax.apply_updates(params, updates), state), (params, told)

    return jax.lax.scan(step, (start, optimizer.init(start)), (losses, gradients))


def reference(losses, gradients, start, which):
    def advance(point, i, scale):
        x, turn = point
        x, turn = x - scale * RATE * (1 + turn) * gradients[i], (turn + 1) % 3
        sound, given = (np.isfinite([losses[i], *of]).all() for of in (x, gradients[i]))
        return losses[i], (x, turn), bool(sound), bool(given)

    run = Run((start, 0), advance, **OPTIONS[which])
    points, told = [], []
    for i in range(len(losses)):
        points.append(run.points[-1][0])
        rule, scale = run.rule, run.rule.scale
        run.step(i)
        counts = rule.returns, rule.unanswered, rule.thrown, rule.skipped
        told.append((*counts, scale, rule.score))
    return np.array(points), [np.array(column) for column in zip(*told, strict=True)], run


def test_every_step_is_the_references():
    events = np.zeros((len(OPTIONS), 5), int)

    @settings(max_examples=100)
    @given(
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12),
        seed=st.integers(0, 999),
        which=st.sampled_from(range(len(OPTIONS))),
    )
    def check(kinds, seed, which):
        given = *losses_of(kinds, seed), np.array([1.0, -2.0]), which
        with jax.enable_x64(True):
            (params, state), (points, told) = jax.device_get(play(*given))
        expected, expected_told, run = reference(*given)
        np.testing.assert_array_equal(points, expected)
        for mine, other in zip(told, expected_told, strict=True):
            np.testing.assert_array_equal(mine, other)
        saved, index = state.snapshots.trusted, run.rule.trusted
        for mine, other in (((params, state.inner), -1), (saved, index)):
            np.testing.assert_array_equal(mine[0], run.points[other][0])
            assert mine[1] == run.points[other][1]
        seen = state.returns, state.unanswered, state.skipped, run.rule.idle, state.cap < 1
        events[which] += np.array(seen) > 0

    check()
    assert (events[:2] > 0).all() and (events[2, :4] > 0).all(), events
