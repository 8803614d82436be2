"""Bad input is one sentence that names the argument, its value and what is allowed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lossguard

SGD = optax.sgd(0.1)
BY_FOUR = lossguard.mean_criterion(training=4)
ONES = jnp.ones(2)


def step(objective):
    guard = lossguard.loss_guard(SGD, SGD, nt=1, nc=1)
    return guard.step(guard.init(ONES), objective)


def guarded_update(value_fn):
    optimizer = lossguard.guarded(SGD, SGD)
    return optimizer.update(ONES, optimizer.init(ONES), ONES, value_fn=value_fn)


WRONG = {
    "nt is 0": (
        lambda: lossguard.loss_guard(SGD, SGD, nt=0),
        "nt must be an integer of at least 1, got 0",
    ),
    "nc is negative": (
        lambda: lossguard.loss_guard(SGD, SGD, nc=-3),
        "nc must be an integer of at least 1, got -3",
    ),
    "nt is a fraction": (
        lambda: lossguard.residual_guard(SGD, SGD, nt=2.5),  # type: ignore
        "nt must be an integer of at least 1, got 2.5",
    ),
    "nt is a bool": (
        lambda: lossguard.unguarded(SGD, nt=True),
        "nt must be an integer of at least 1, got True",
    ),
    "loser": (
        lambda: lossguard.loss_guard(SGD, SGD, loser="forget"),  # type: ignore
        "loser must be one of keep, rollback, reset, got 'forget'",
    ),
    "nc of recommended": (
        lambda: lossguard.recommended(SGD, SGD, nc=1),
        "nc must be between 2 and most = 16, or most itself, got 1",
    ),
    "most of recommended": (
        lambda: lossguard.recommended(SGD, SGD, most=9),
        "nc must be between 2 and most = 9, or most itself, got 10",
    ),
    "most of recommended is a fraction": (
        lambda: lossguard.recommended(SGD, SGD, most=40.5),  # type: ignore
        "most must be an integer of at least 0, got 40.5",
    ),
    "nothing is compared": (
        lambda: lossguard.recommended(SGD, SGD, nt=1, nc=0),
        "nc must be an integer of at least 1, got 0",
    ),
    "nt is too small for the criterion": (
        lambda: lossguard.loss_guard(SGD, SGD, criterion=BY_FOUR, nt=3),
        "nt must be at least 4 for this criterion, got 3",
    ),
    "training is negative": (
        lambda: lossguard.mean_criterion(training=-1),
        "training must be an integer of at least 0, got -1",
    ),
    "criterion is not called": (
        lambda: lossguard.loss_guard(SGD, SGD, criterion=lossguard.mean_criterion),  # type: ignore
        "criterion must be a Criterion such as mean_criterion(), got <function mean_criterion at",
    ),
    "windows are not called": (
        lambda: lossguard.loss_guard(SGD, SGD, windows=lossguard.adaptive),  # type: ignore
        "windows must be a Windows such as adaptive(), got <function adaptive at",
    ),
    "probing is not called": (
        lambda: lossguard.loss_guard(SGD, SGD, probing=lossguard.backoff),  # type: ignore
        "probing must be a Probing such as backoff(), got <function backoff at",
    ),
    "ratchet is not called": (
        lambda: lossguard.loss_guard(SGD, SGD, ratchet=lossguard.ratchet),  # type: ignore
        "ratchet must be a Ratchet such as ratchet(), got <function ratchet at",
    ),
    "sequence is not called": (
        lambda: lossguard.residual_guard(SGD, SGD, sequence=lossguard.ema),  # type: ignore
        "sequence must be a TrackingSequence such as ema(0.9), got <function ema at",
    ),
    "checks": (
        lambda: lossguard.loss_guard(SGD, SGD, checks="others"),  # type: ignore
        "checks must be one of next, apart, got 'others'",
    ),
    "residual": (
        lambda: lossguard.residual_guard(SGD, SGD, residual="loss"),  # type: ignore
        "residual must be one of step, gradient, got 'loss'",
    ),
    "alpha is 0": (
        lambda: lossguard.residual_guard(SGD, SGD, alpha=0.0),
        "alpha must be above 0 and at most 1, got 0.0",
    ),
    "alpha is above 1": (
        lambda: lossguard.residual_guard(SGD, SGD, alpha=1.5),
        "alpha must be above 0 and at most 1, got 1.5",
    ),
    "a decay in quotes": (
        lambda: lossguard.track_record(decay="0.9"),  # type: ignore
        "decay must be above 0 and below 1, got '0.9'",
    ),
    "no confidence": (
        lambda: lossguard.paired_criterion(confidence=None),  # type: ignore
        "confidence must be at least 0.5 and below 1, got None",
    ),
    "theta of ema": (lambda: lossguard.ema(1.5), "theta must be above 0 and at most 1, got 1.5"),
    "theta of geometric": (
        lambda: lossguard.geometric(-1.0),
        "theta must be above 0 and at most 1, got -1.0",
    ),
    "a step from parameters": (
        lambda: lossguard.unguarded(SGD).step(ONES, lambda w, i: jnp.sum(w)),  # type: ignore
        "state must be a GuardState such as guard.init(params), got Array([1., 1.]",
    ),
    "a step of another guard": (
        lambda: lossguard.recommended(SGD, SGD).step(
            lossguard.residual_guard(SGD, SGD).init(ONES), lambda w, i: jnp.sum(w)
        ),
        "state must be of this guard's own init(params), whose inner is a LossGuardState, got "
        "ResidualGuardState(",
    ),
    "no params": (
        lambda: lossguard.loss_guard(SGD, SGD).init({}),
        "params must hold at least one array, got {}",
    ),
    "rollout of a function": (
        lambda: lossguard.rollout(lossguard.recommended, None, None, cycles=1),  # type: ignore
        "guard must be a Guard such as recommended(learned, fallback), got <function recommended",
    ),
    "rollout from parameters": (
        lambda: lossguard.rollout(lossguard.unguarded(SGD), {}, None, cycles=1),  # type: ignore
        "state must be a GuardState such as guard.init(params), got {}",
    ),
    "a guard that is to be guarded": (
        lambda: lossguard.recommended(lossguard.unguarded(SGD), SGD),
        "learned must be an optax GradientTransformation, got Guard(init=",
    ),
    "m": (lambda: lossguard.recent_max(0), "m must be an integer of at least 1, got 0"),
    "learned": (
        lambda: lossguard.residual_guard(optax.sgd, SGD),
        "learned must be an optax GradientTransformation, got <function sgd",
    ),
    "fallback": (
        lambda: lossguard.loss_guard(SGD, None),
        "fallback must be an optax GradientTransformation, got None",
    ),
    "optimizer": (
        lambda: lossguard.unguarded(0.1),
        "optimizer must be an optax GradientTransformation, got 0.1",
    ),
    "both of guarded": (
        lambda: lossguard.guarded(SGD, "sgd"),
        "fallback must be an optax GradientTransformation, got 'sgd'",
    ),
    "integer parameters": (
        lambda: lossguard.unguarded(SGD).init({"w": ONES, "n": jnp.arange(3)}),
        "params must be floating-point arrays, but its leaf ['n'] is int32",
    ),
    "an integer as parameters": (
        lambda: lossguard.loss_guard(SGD, SGD).init(3),
        "params must be floating-point arrays, but its leaf itself is int32",
    ),
    "complex parameters": (
        lambda: lossguard.residual_guard(SGD, SGD).init((ONES, 1j * ONES)),
        "params must be floating-point arrays, but its leaf [1] is complex64",
    ),
    "a layer as parameters": (
        lambda: lossguard.loss_guard(SGD, SGD).init({"w": ONES, "activation": "relu"}),
        "params must be floating-point arrays, but its leaf ['activation'] is 'relu'",
    ),
    "a number as learned": (
        lambda: lossguard.loss_guard(3, SGD),
        "learned must be an optax GradientTransformation, got 3",
    ),
    "a value per sample": (
        lambda: guarded_update(lambda w: w**2),
        "value_fn must return a scalar floating-point loss, got [",
    ),
    "a value and something else": (
        lambda: guarded_update(lambda w: (jnp.sum(w), w)),
        "value_fn must return a scalar floating-point loss, got (",
    ),
    "no cells": (
        lambda: lossguard.init_lstm_weights(jax.random.key(0), hidden=0),
        "hidden must be an integer of at least 1, got 0",
    ),
    "no layers": (
        lambda: lossguard.init_lstm_weights(jax.random.key(0), layers=0),
        "layers must be an integer of at least 1, got 0",
    ),
    "a loss per sample": (
        lambda: step(lambda w, i: w**2),
        "objective must return a scalar floating-point loss, got ShapeDtypeStruct(shape=(2,)",
    ),
    "a loss that is an integer": (
        lambda: step(lambda w, i: jnp.argmax(w)),
        "objective must return a scalar floating-point loss, got ShapeDtypeStruct(shape=(), "
        "dtype=int32",
    ),
    "a loss and something else": (
        lambda: step(lambda w, i: (jnp.sum(w), w)),
        "objective must return a scalar floating-point loss, got (ShapeDtypeStruct",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=list(WRONG))
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "make",
    [
        lambda three, part: lossguard.unguarded(SGD, nt=three),
        lambda three, part: lossguard.residual_guard(
            SGD, SGD, nt=three, alpha=part, sequence=lossguard.ema(part)
        ),
        lambda three, part: lossguard.loss_guard(
            SGD,
            SGD,
            nt=three,
            nc=three,
            hedge=lossguard.track_record(decay=part, share=part),
            criterion=lossguard.sequential_criterion(first=three, most=2 * three),
            probing=lossguard.backoff(patience=three, most=three),
            ratchet=lossguard.ratchet(cycles=three, tolerance=part),
        ),
        lambda three, part: lossguard.loss_guard(
            SGD, SGD, nt=three, nc=three, windows=lossguard.adaptive(most=three, apart=1 + part)
        ),
        lambda three, part: lossguard.best_of(
            [lossguard.unguarded(SGD, nt=three)], nc=three, decay=part
        ),
    ],
)
@pytest.mark.usefixtures("x64")
def test_numpys_numbers_are_numbers(make) -> None:
    """Whose types would otherwise change those of a float32 state."""
    guard = make(np.int64(3), np.float64(0.5))
    state = guard.init(jnp.ones(2, jnp.float32))
    step = jax.jit(lambda state: guard.step(state, lambda w, i: jnp.sum(w**2)))
    for _ in range(3):
        before, (state, _) = state, step(state)
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(
            lambda leaf: leaf.dtype, before
        )
    assert step._cache_size() == 1


def test_a_bound_that_never_shrinks_is_allowed() -> None:
    assert lossguard.geometric(1.0).update(jnp.float32(2.0), jnp.float32(1.0)) == 2
