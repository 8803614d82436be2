"""Bad input is one sentence that names the argument, its value and what is allowed."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lossguard import (
    best_of,
    ema,
    guarded,
    hedged,
    init_lstm_weights,
    init_mlp_weights,
    loss_guard,
    recommended,
    residual_guard,
    rewind,
    rollout,
    unguarded,
)

SGD = optax.sgd(0.1)
IN_STEPS = optax.MultiSteps(optax.sgd(optax.linear_schedule(1.0, 0.0, 9)), 4)
LOOKAHEAD = optax.chain(optax.clip(1.0), optax.lookahead(SGD, 5, 0.5))
SUMS = optax.stateless(lambda updates, _: jnp.sum(updates, keepdims=True))
"""Whose updates could be broadcast."""
ALONE, ADAM = unguarded(SGD), unguarded(optax.adam(0.1))
ONES = jnp.ones(2)
KEY = jax.random.key(0)


def total(w, i):
    return jnp.sum(w)


def step(loss, guard=loss_guard, minibatches=None, extra=None):
    made = guard(SGD, SGD)
    return made.step(made.init(ONES, extra), loss, minibatches)


def guarded_update(value_fn, params=ONES):
    optimizer = guarded(SGD, SGD)
    return optimizer.update(ONES, optimizer.init(ONES), params, value_fn=value_fn)


def rewound(of=SGD, **arguments):
    optimizer = rewind(of)
    return optimizer.update(
        ONES, optimizer.init(ONES), **{"params": ONES, "value": 1.0} | arguments
    )


# The sentence, without what each ends with, and what is said about; types are wrong on purpose.
WRONG = {
    " must be an integer of at least 1, got ": {
        "nt|0": lambda: loss_guard(SGD, SGD, nt=0),
        "nc|-3": lambda: loss_guard(SGD, SGD, nc=-3),
        "nt|2.5": lambda: residual_guard(SGD, SGD, nt=2.5),
        "nt|True": lambda: unguarded(SGD, nt=True),
        "nt|-1": lambda: recommended(SGD, SGD, nt=-1),
        "nt|1.0": lambda: hedged(SGD, SGD, nt=1.0),
        "hidden|0": lambda: init_lstm_weights(KEY, hidden=0),
        "layers|0": lambda: init_lstm_weights(KEY, layers=0),
    },
    " must be at most 1000000, got ": {
        "nt|1000001": lambda: recommended(SGD, SGD, nt=10**6 + 1),
        "nc|2147483647": lambda: loss_guard(SGD, SGD, nc=2**31 - 1),
    },
    " must be at most ": {
        "hidden|10000, got 2147483647": lambda: init_lstm_weights(KEY, hidden=2**31 - 1),
        "layers|100, got 101": lambda: init_mlp_weights(KEY, layers=101),
        "layers|100, got one of many digits": lambda: init_mlp_weights(KEY, layers=10**5000),
    },
    " must be a sequence of at least one guard, got ": {
        "guards|none": lambda: best_of([]),
    },
    " must have the same nt, got ": {
        "guards|[2, 3]": lambda: step(
            total, lambda *_: best_of(unguarded(SGD, nt=nt) for nt in (2, 3))
        )
    },
    " must be ": {
        "window|an integer of at least 64, got 8": lambda: rewind(SGD, window=8),
        "window|a multiple of 8, got 100": lambda: rewind(SGD, window=100),
        "value|a scalar floating-point loss, got Array([1., 1.]": lambda: rewound(value=ONES),
        "value|a scalar floating-point loss, got 1": lambda: rewound(value=1),
        "value|a scalar floating-point loss, got (1.0, 'aux')": lambda: rewound(value=(1.0, "aux")),
    },
    " must be given: update(updates, state, params, value=loss)": {
        "params|": lambda: rewound(params=None),
        "value|": lambda: rewound(value=None),
    },
    " must keep the structure, shapes and types that they had in init, got ": {
        "params|['float16[2]']": lambda: rewound(params=ONES.astype(jnp.float16)),
        "params|['float32[3]']": lambda: rewound(params=jnp.ones(3)),
        "params|['[0] float32[2]']": lambda: rewound(params=[ONES]),
    },
    " must be at least 0 and below 1, got ": {
        "share|1.0": lambda: recommended(SGD, SGD, share=1.0),
        "share|-0.1": lambda: hedged(SGD, SGD, share=-0.1),
        "share|2": lambda: best_of([ALONE], share=2),
        "rho|1": lambda: rewind(SGD, rho=1),
        "rise|-0.1": lambda: rewind(SGD, rise=-0.1),
    },
    " must be above 0 and at most 1, got ": {
        "alpha|0.0": lambda: residual_guard(SGD, SGD, alpha=0.0),
        "alpha|1.5": lambda: residual_guard(SGD, SGD, alpha=1.5),
        "theta|1.2": lambda: ema(1.2),
        "theta|-1.0": lambda: ema(-1.0),
        "factor|0": lambda: rewind(SGD, factor=0),
    },
    " must be above 0 and below 1, got ": {"decay|1.0": lambda: best_of([ALONE], decay=1.0)},
    " must be a number above 0 and below 1, got ": {
        "decay|'0.9'": lambda: best_of([ALONE], decay="0.9")
    },
    " must be one of ": {
        "loser|keep, reset, got 'forget'": lambda: loss_guard(SGD, SGD, loser="forget"),
        "residual|step, gradient, got 'loss'": lambda: residual_guard(SGD, SGD, residual="loss"),
    },
    " must be an optax GradientTransformation, got ": {
        "learned|<function sgd": lambda: residual_guard(optax.sgd, SGD),
        "learned|a guard (give its optimizer)": lambda: recommended(ALONE, SGD),
        "learned|3": lambda: loss_guard(3, SGD),
        "fallback|None": lambda: loss_guard(SGD, None),
        "fallback|'sgd'": lambda: guarded(SGD, "sgd"),
        "optimizer|0.1": lambda: unguarded(0.1),
        "optimizer|'adam'": lambda: rewind("adam"),
    },
    " must be an ": {
        "guards|Iterable such as [unguarded(optax.sgd(0.1))], got None": lambda: best_of(None),
    },
    " must be a ": {
        "sequence|TrackingSequence such as ema(0.9), got <function ema at": (
            lambda: residual_guard(SGD, SGD, sequence=ema)
        ),
        "state|GuardState such as guard.init(params), got Array([1., 1.]": (
            lambda: ALONE.step(ONES, total)
        ),
        "each of guards|Guard such as unguarded(optimizer), got a Grad": lambda: best_of([SGD]),
        "each of guards|Guard such as unguarded(optimizer), got <func": lambda: best_of(ALONE),
        "state|RewindState such as optimizer.init(params), got (": (
            lambda: rewind(SGD).update(ONES, SGD.init(ONES), ONES, value=1.0)
        ),
        "state|GuardState such as guard.init(params), got {}": (
            lambda: rollout(ALONE, {}, None, cycles=1)
        ),
        "guard|Guard such as recommended(learned, fallback), got <function recommended": (
            lambda: rollout(recommended, None, None, cycles=1)
        ),
    },
    " must return updates of the shapes of its gradients, ": {
        "learned|[(2,)], got [(1,)]": lambda: step(total, lambda *_: recommended(SUMS, SGD)),
        "fallback|[(2,)], got [(1,)]": lambda: step(total, lambda *_: residual_guard(SGD, SUMS)),
        "optimizer|[(2,)], got [(1,)]": lambda: rewound(of=SUMS),
    },
    " must have its schedules outside of optax.MultiSteps, as a guard advances them by mini": {
        "learned|": lambda: recommended(IN_STEPS, SGD).init(ONES),
        "fallback|": lambda: hedged(SGD, IN_STEPS).init(ONES),
        "each of guards|": lambda: best_of([unguarded(IN_STEPS)], share=0.1).init(ONES),
    },
    " must go with check=, whose minibatches it counts, got ": {
        "nc|3": lambda: best_of([ALONE], nc=3)
    },
    " must be None or a function, got ": {"check|3": lambda: best_of([ALONE], check=3)},
    " must be a function ": {
        "loss|loss(params, minibatch), got 'f'": lambda: step("f"),
        "loss|loss(params, minibatch), got None": (lambda: step(None, lambda *_: best_of([ALONE]))),
        "loss|loss(params, extra, minibatch), got 'mse'": lambda: step("mse", extra=ONES),
    },
    " must be arrays whose first axis are the 20 of a cycle, got ": {
        "minibatches|['19']": lambda: step(total, minibatches=jnp.ones((19, 3))),
        "minibatches|['20', '21']": lambda: step(
            total, minibatches=(jnp.ones((20, 2)), np.ones(21))
        ),
        "minibatches|['20', 'none']": lambda: step(total, minibatches=(jnp.ones(20), 1.0)),
        "minibatches|no arrays": lambda: step(total, minibatches={}),
        "minibatches|['40']": lambda: step(total, minibatches=jnp.arange(40)),
    },
    " must be arrays whose first axis are the 10 of a cycle, got ": {
        "minibatches|['20']": lambda: step(total, lambda *_: best_of([ALONE]), jnp.arange(20)),
    },
    " must be arrays, but its leaf ": {
        "extra|['f'] is 'relu'": lambda: ALONE.init(ONES, {"f": "relu"}),
        "extra|itself is 'relu'": lambda: best_of([ALONE]).init(ONES, "relu"),
    },
    " must return extra in the structure and shapes that it got, ": {
        "loss|(2,), got (3,)": lambda: step(
            lambda w, extra, i: (jnp.sum(w), jnp.ones(3)), extra=ONES
        ),
        "loss|(2,), got {'a': (2,)}": lambda: step(
            lambda w, extra, i: (jnp.sum(w), {"a": extra}), extra=ONES
        ),
    },
    ".update needs ": {
        "guarded(...)|value_fn, which was not given": lambda: guarded_update(None),
    },
    " must hold at least one array, got ": {
        "params|{}": lambda: loss_guard(SGD, SGD).init({}),
        "params|None": lambda: guarded_update(total, params=None),
    },
    " must be floating-point arrays, but its leaf ": {
        "params|['n'] is int32": lambda: ALONE.init({"w": ONES, "n": jnp.arange(3)}),
        "params|itself is int32": lambda: loss_guard(SGD, SGD).init(3),
        "params|itself is int16": lambda: rewind(SGD).init(jnp.ones(2, jnp.int16)),
        "params|[1] is complex64": lambda: residual_guard(SGD, SGD).init((ONES, 1j * ONES)),
        "params|['f'] is 'relu'": lambda: loss_guard(SGD, SGD).init({"w": ONES, "f": "relu"}),
    },
    " must be of 16 bits at least, in which JAX can compute, but its leaf ": {
        "params|itself is float8_e4m3fn": lambda: ALONE.init(ONES.astype(jnp.float8_e4m3fn)),
        "params|[1] is float8_e5m2": lambda: rewind(SGD).init([ONES, jnp.ones(2, jnp.float8_e5m2)]),
    },
    " must not be NaN at the start, but its leaf ": {
        "params|['b'] is": lambda: recommended(SGD, SGD).init({"a": ONES, "b": jnp.nan * ONES}),
        "params|itself is": lambda: rewind(SGD).init(np.array([0.0, np.nan])),
        "params|[0] is": lambda: best_of([ALONE]).init([math.nan, 1.0]),
    },
    " must return a floating-point scalar": {
        "value_fn|, got float32[2]": lambda: guarded_update(lambda w: w**2),
        **{
            f"loss|, got float32[{n}]": lambda g=g, n=n: step(lambda w, i: jnp.ones(n), g)
            for n, g in enumerate((loss_guard, recommended, hedged), start=2)
        },
        "loss|, got int32[]": lambda: step(lambda w, i: jnp.argmax(w)),
        "loss|, got None": lambda: step(lambda w, i: None),
        "loss| first, got float32[2]": lambda: step(lambda w, i: (w, jnp.sum(w))),
        "check|, got float32[2]": lambda: step(
            total, lambda *_: best_of([ALONE], check=lambda w, i: w)
        ),
    },
    " must return a scalar, or (scalar, aux), got ": {
        "loss|a tuple of 3": lambda: step(lambda w, i: (jnp.sum(w), w, w)),
        "loss|a tuple of 0": lambda: step(lambda w, i: (), lambda *_: best_of([ALONE])),
    },
    " must return (scalar, extra), or (scalar, extra, aux), got ": {
        "loss|float32[]": lambda: step(lambda w, extra, i: jnp.sum(w), extra=ONES),
        "loss|a tuple of 4": lambda: step(lambda w, extra, i: (jnp.sum(w),) * 4, extra=ONES),
    },
}
CALLS = {
    said.replace("|", allowed): call for allowed, of in WRONG.items() for said, call in of.items()
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("sentence", CALLS)
def test_bad_input(sentence) -> None:
    with pytest.raises(ValueError) as error:
        CALLS[sentence]()
    assert str(error.value).startswith(sentence)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("guard", "other"),
    [
        (recommended(SGD, SGD), residual_guard(SGD, SGD)),
        (hedged(SGD, SGD), recommended(SGD, SGD)),
        (recommended(SGD, SGD), recommended(optax.adam(0.1), SGD)),
        (ALONE, ADAM),
        (best_of([ALONE, ALONE]), best_of([ALONE])),
        (best_of([ALONE, ADAM]), best_of([ADAM, ALONE])),
    ],
)
def test_the_state_of_another_guard_or_optimizer_is_refused(guard, other) -> None:
    with pytest.raises(ValueError, match=r"^state must be of this guard's own init\(params\)"):
        guard.step(other.init(ONES), total)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", [unguarded, rewind], ids=["unguarded", "rewind"])
def test_a_state_may_hold_functions_that_init_makes(make) -> None:
    def init(params):
        return jax.tree_util.Partial(lambda x: x, jnp.ones(()))

    guard = make(optax.GradientTransformation(init, lambda u, state, params: (u, state)))
    state = guard.init(ONES)
    if make is unguarded:
        guard.step(state, total)
    else:
        guard.update(ONES, state, ONES, value=jnp.float32(1))


def test_the_state_of_a_rewind_of_another_optimizer_is_refused() -> None:
    state = rewind(optax.adam(0.1)).init(ONES)
    with pytest.raises(ValueError, match=r"^state must be of this optimizer's own init\(params\)"):
        rewind(SGD).update(ONES, state, ONES, value=jnp.float32(1))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "params", [ONES[:1], ONES[0], jnp.ones((3, 2)), jnp.ones(3), ONES.astype(jnp.bfloat16)]
)
@pytest.mark.parametrize("make", [recommended, hedged, lambda *_: best_of([ALONE])])
def test_parameters_of_other_shapes_or_types_are_refused(make, params) -> None:
    """They might be broadcast."""
    guard = make(SGD, SGD)
    told = re.escape(f", got another one, with ['{params.dtype}{[*params.shape]}'] now")
    with pytest.raises(ValueError, match=f"{told}$"):
        guard.step(guard.init(ONES)._replace(params=params), total)


@pytest.mark.parametrize(
    "make", [lambda one: recommended(one, SGD), lambda one: residual_guard(SGD, one), unguarded]
)
def test_optax_refuses_a_lookahead_by_itself(make) -> None:
    """It has two sets of parameters."""
    with pytest.raises(AttributeError, match=r"no attribute '?fast"):
        step(total, lambda *_: make(LOOKAHEAD))


@pytest.mark.usefixtures("unchecked", "x64")
@pytest.mark.parametrize(
    "make",
    [
        lambda three, part: unguarded(SGD, nt=three),
        lambda three, part: residual_guard(SGD, SGD, nt=three, alpha=part, sequence=ema(part)),
        lambda three, part: loss_guard(SGD, SGD, nt=three, nc=three),
        lambda three, part: recommended(SGD, SGD, nt=three, share=part),
        lambda three, part: hedged(SGD, SGD, nt=three, share=part),
        lambda three, part: best_of(
            [unguarded(SGD, nt=three)],
            share=part,
            check=lambda w, i: jnp.sum(w**2),
            nc=three,
            decay=part,
        ),
    ],
)
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


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", [lambda: recommended(SGD, SGD), lambda: rewind(SGD)])
def test_a_start_that_is_traced_or_a_mask_is_let_in(make) -> None:
    made = make()
    ruined, masked = jnp.nan * ONES, jnp.array([0.0, -jnp.inf])
    assert jax.tree.leaves(jax.jit(made.init)(ruined))
    assert jax.tree.leaves(jax.vmap(made.init)(jnp.stack([ruined, ONES])))
    assert jax.tree.leaves(made.init({"mask": masked, "w": ONES}))
