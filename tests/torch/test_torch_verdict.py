"""Criteria, backoff and the choice among lanes are JAX's, number by number."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import lossguard.torch as ours
from lossguard.torch.probing import ProbingState
from lossguard.torch.verdict import follow_first, judge

pytest.importorskip("jax")

import jax.numpy as jnp
from lossguard.guards.probing import init_probing

import lossguard as theirs
from lossguard.guards import verdict as jax_verdict

CRITERIA = {
    "mean": lambda lib: lib.mean_criterion(),
    "paired": lambda lib: lib.paired_criterion(confidence=0.8),
    "sequential": lambda lib: lib.sequential_criterion(confidence=0.9, first=3, most=10),
    "curtailed": lambda lib: lib.curtailed_criterion(first=2, most=3),
}
loss = st.sampled_from([0.5, 1.0, 1.25, 2.0, 3.0, math.inf, math.nan])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(),
    m=st.integers(1, 2),
    trusted=st.integers(1, 2),
    name=st.sampled_from([*CRITERIA]),
)
def test_the_verdict(data, m, trusted, name):
    lanes = m + trusted
    checks = data.draw(
        st.lists(st.lists(loss, min_size=3, max_size=3), min_size=lanes, max_size=lanes)
    )
    sound = data.draw(st.lists(st.booleans(), min_size=lanes, max_size=lanes))
    verdict = judge(CRITERIA[name](ours), checks, sound, m)
    padded = jnp.pad(jnp.array(checks), ((0, 0), (0, 7)))
    expected = jax_verdict.judge(CRITERIA[name](theirs), padded, jnp.int32(3), jnp.array(sound), m)
    for field, value in verdict._asdict().items():
        np.testing.assert_allclose(value, getattr(expected, field), rtol=1e-6, err_msg=field)
    assert CRITERIA[name](ours).looks == CRITERIA[name](theirs).looks


@pytest.mark.parametrize("sound", [[True, False], [False, True], [False]])
def test_following_the_fallback(sound):
    verdict = follow_first(sound)
    expected = jax_verdict.follow_first(jnp.array(sound), jnp.dtype("float32"))
    for field, value in verdict._asdict().items():
        np.testing.assert_allclose(value, getattr(expected, field), err_msg=field)


def test_the_paired_test_is_scipys():
    rng = np.random.default_rng(0)
    for shift in np.linspace(-1, 1, 41):
        d = rng.normal(shift, size=(1, 12))
        better, settled = ours.paired_criterion(confidence=0.95).test(d)
        p = stats.ttest_1samp(d[0], 0, alternative="greater").pvalue
        assert (better[0], settled[0]) == (p < 0.05, p < 0.05 or p > 0.95)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    wins=st.lists(st.booleans(), max_size=20),
    patience=st.integers(1, 3),
    most=st.integers(1, 5),
)
def test_backoff(wins, patience, most):
    rule, expected_rule = (lib.backoff(patience=patience, most=most) for lib in (ours, theirs))
    state, expected = ProbingState(), init_probing()
    for won in wins:
        probed = state.left == 0
        state = rule.update(state, probed, won and probed)
        expected = expected_rule.update(expected, jnp.array(probed), jnp.array(won and probed))
        assert tuple(state) == tuple(map(int, expected))
