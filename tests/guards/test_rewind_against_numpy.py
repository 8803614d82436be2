"""``rewind`` step by step against the rule in plain Python.

All numbers are sums of powers of two, so both are exact and must be equal to the last bit.
"""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from numpy_rewind import Run

import lossguard

RATE = 0.25
KINDS = ("flat", "falls", "rises", "spikes", "infinite", "broken", "lower")
LENGTH = 600
OPTIONS = (
    {"window": 64},
    {"window": 128, "rho": 0.5, "factor": 0.25, "rise": 0.125},
    {"window": 64, "rho": 0.0, "rise": 0.0},
)


def turning() -> optax.GradientTransformation:
    """SGD at a rate that depends on how often it was called: state that a return must restore."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -RATE * (1 + state) * g, updates), (state + 1) % 3

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


@partial(jax.jit, static_argnames="which")
def play(losses, gradients, start, which):
    """Where it is before each step and what it tells, and the last parameters and state."""
    optimizer = lossguard.rewind(turning(), **{"rise": 1 / 16} | OPTIONS[which])

    def step(carry, given):
        params, state = carry
        loss, gradient = given
        updates, state = optimizer.update(gradient, state, params, value=loss)
        told = state.returns, state.thrown, state.skipped, state.scale, state.alarm.score
        return (optax.apply_updates(params, updates), state), (params, told)

    return jax.lax.scan(step, (start, optimizer.init(start)), (losses, gradients))


def reference(losses, gradients, start, which):
    def advance(point, i, scale):
        x, turn = point
        x, turn = x - scale * RATE * (1 + turn) * gradients[i], (turn + 1) % 3
        return losses[i], (x, turn), bool(np.isfinite([losses[i], *x]).all())

    run = Run((start, 0), advance, **{"rise": 1 / 16} | OPTIONS[which])
    points, told = [], []
    for i in range(len(losses)):
        points.append(run.points[-1][0])
        rule, scale = run.rule, run.rule.scale
        run.step(i)
        told.append((rule.returns, rule.thrown, rule.skipped, scale, rule.score))
    return np.array(points), [np.array(column) for column in zip(*told, strict=True)], run


def losses_of(kinds, seed):
    """Losses and gradients that behave in each part of a run as it says."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 64, LENGTH) / 64
    gradients = rng.integers(-8, 9, (LENGTH, 2)) / 8.0
    level, levels = 16.0, np.empty(LENGTH)
    for rows, kind in zip(np.array_split(np.arange(LENGTH), len(kinds)), kinds, strict=True):
        count = np.arange(len(rows))
        slope = {"falls": -1 / 32, "rises": 1 / 16}.get(kind, 0.0)
        level += {"lower": -2.0, "spikes": 8.0}.get(kind, 0.0)
        levels[rows] = level + slope * count
        level = levels[rows[-1]] - (8.0 if kind == "spikes" else 0.0)
        if kind == "infinite":
            levels[rows[count % 3 > 0]] = np.inf
        if kind == "broken":
            gradients[rows[count % 4 > 0]] = np.nan
    return levels + noise, gradients


def test_every_step_is_the_references():
    events = np.zeros((len(OPTIONS), 4), int)

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
        seen = state.returns, state.unanswered, state.skipped, state.cap < 1
        events[which] += np.array(seen) > 0

    check()
    assert (events[:2] > 0).all() and (events[2, :3] > 0).all(), events
