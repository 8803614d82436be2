"""Bad input is one sentence that names the argument, its value and what is allowed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lossguard

SGD = optax.sgd(0.1)
ONES = jnp.ones(2)


def step(objective, name="loss_guard"):
    guard = getattr(lossguard, name)(SGD, SGD)
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
        "loser must be one of keep, reset, got 'forget'",
    ),
    "share of recommended": (
        lambda: lossguard.recommended(SGD, SGD, share=1.0),
        "share must be at least 0 and below 1, got 1.0",
    ),
    "share of hedged": (
        lambda: lossguard.hedged(SGD, SGD, share=-0.1),
        "share must be at least 0 and below 1, got -0.1",
    ),
    "share of best_of": (
        lambda: lossguard.best_of([lossguard.unguarded(SGD)], share=2),
        "share must be at least 0 and below 1, got 2",
    ),
    "nt of recommended": (
        lambda: lossguard.recommended(SGD, SGD, nt=0),
        "nt must be an integer of at least 1, got 0",
    ),
    "nt of hedged": (
        lambda: lossguard.hedged(SGD, SGD, nt=1.0),  # type: ignore
        "nt must be an integer of at least 1, got 1.0",
    ),
    "a decay in quotes": (
        lambda: lossguard.best_of([lossguard.unguarded(SGD)], decay="0.9"),  # type: ignore
        "decay must be above 0 and below 1, got '0.9'",
    ),
    "sequence is not called": (
        lambda: lossguard.residual_guard(SGD, SGD, sequence=lossguard.ema),  # type: ignore
        "sequence must be a TrackingSequence such as ema(0.9), got <function ema at",
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
    "theta of ema": (lambda: lossguard.ema(1.5), "theta must be above 0 and at most 1, got 1.5"),
    "a step from parameters": (
        lambda: lossguard.unguarded(SGD).step(ONES, lambda w, i: jnp.sum(w)),  # type: ignore
        "state must be a GuardState such as guard.init(params), got Array([1., 1.]",
    ),
    "a step of another guard": (
        lambda: lossguard.recommended(SGD, SGD).step(
            lossguard.residual_guard(SGD, SGD).init(ONES), lambda w, i: jnp.sum(w)
        ),
        "state must be of this guard's own init(params), whose inner is a RecommendedState, got "
        "ResidualGuardState(",
    ),
    "a step of hedged from recommended's state": (
        lambda: lossguard.hedged(SGD, SGD).step(
            lossguard.recommended(SGD, SGD).init(ONES), lambda w, i: jnp.sum(w)
        ),
        "state must be of this guard's own init(params), whose inner is a HedgedState, got "
        "RecommendedState(",
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
    "a loss per sample for recommended": (
        lambda: step(lambda w, i: w**2, "recommended"),
        "objective must return a scalar floating-point loss, got ShapeDtypeStruct(shape=(2,)",
    ),
    "a loss per sample for hedged": (
        lambda: step(lambda w, i: w**2, "hedged"),
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
        lambda three, part: lossguard.loss_guard(SGD, SGD, nt=three, nc=three),
        lambda three, part: lossguard.recommended(SGD, SGD, nt=three, share=part),
        lambda three, part: lossguard.hedged(SGD, SGD, nt=three, share=part),
        lambda three, part: lossguard.best_of(
            [lossguard.unguarded(SGD, nt=three)], share=part, nc=three, decay=part
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
