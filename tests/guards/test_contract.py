"""The contract of every guard, with every kind of optax optimizer on either side.

A step compiled and vmapped over seeds equals the same step run seed by seed and operation by
operation; it compiles once; dtypes, structure and counters are kept.
"""

from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float

import lossguard

NT, NC = 2, 1
R = 0.05
OPTIMIZERS = {
    "sgd": optax.sgd(R),
    "nesterov": optax.sgd(R, momentum=0.9, nesterov=True),
    "schedule": optax.sgd(lossguard.paper_decay(R, tau=10.0)),
    "adam": optax.adam(R),
    "adamw": optax.adamw(R),  # wants params
    "lion": optax.lion(R),
    "adabelief": optax.adabelief(R),
    "rmsprop": optax.rmsprop(R),
    "adafactor": optax.adafactor(R),
    "add_noise": optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(0)), optax.sgd(R)),
    "polyak_sgd": optax.polyak_sgd(max_learning_rate=0.5),  # wants value
    "lbfgs": optax.lbfgs(memory_size=2, linesearch=optax.scale_by_zoom_linesearch(3)),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "prodigy": optax.contrib.prodigy(),
    "dadapt_adamw": optax.contrib.dadapt_adamw(),
    "schedule_free": optax.contrib.schedule_free_sgd(R),
    "reduce_on_plateau": optax.chain(
        optax.sgd(R), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    ),
    "sam": optax.contrib.sam(  # wants grad_fn, and nothing else
        optax.sgd(R), optax.chain(optax.contrib.normalize(), optax.sgd(0.01)), opaque_mode=True
    ),
    "MultiSteps": optax.MultiSteps(optax.sgd(R), 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(R),
    "lstm": lossguard.lstm_optimizer(lossguard.init_lstm_weights(jax.random.key(0), hidden=4)),
    "mlp": lossguard.mlp_optimizer(lossguard.init_mlp_weights(jax.random.key(0))),
}
NAMES = list(OPTIMIZERS)

GUARDS = {
    "keep": lambda y, z: lossguard.loss_guard(y, z, nt=NT, nc=NC),
    "reset": lambda y, z: lossguard.loss_guard(y, z, nt=NT, nc=NC, loser="reset"),
    "recommended": lambda y, z: lossguard.recommended(y, z, nt=NT, share=0.2),
    "hedged": lambda y, z: lossguard.hedged(y, z, nt=NT, share=0.2),
    "residual": lambda y, z: lossguard.residual_guard(y, z, nt=NT),
    "unguarded": lambda y, z: lossguard.unguarded(y, nt=NT),
    "best of": lambda y, z: lossguard.best_of(
        [lossguard.loss_guard(y, z, nt=NT, nc=NC), lossguard.unguarded(z, nt=NT)]
    ),
    "best of with share": lambda y, z: lossguard.best_of(
        [lossguard.unguarded(z, nt=NT), lossguard.unguarded(y, nt=NT)], share=0.2
    ),
}
RELAYS = ("recommended", "hedged")


class Layer(eqx.Module):
    """Parameters as people keep them."""

    weight: Float[Array, "n m"]
    bias: Float[Array, ""]


def start(dtypes=(jnp.float32, jnp.float32)) -> Layer:
    weight = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)
    return Layer(weight.astype(dtypes[0]), jnp.zeros((), dtypes[1]))


class Objective(eqx.Module):
    """Least squares on minibatches drawn from (key, i)."""

    key: Array

    def __call__(self, params, i):
        x = jax.random.normal(jax.random.fold_in(self.key, i), (4, 3), params.weight.dtype)
        return jnp.mean((jnp.tanh(x @ params.weight) + params.bias - x[:, :2]) ** 2)


# What is like sgd or adam in what it is given and keeps; random campaigns and traces have it.
PLAIN = ("sgd", "schedule", "adamw", "lion", "adabelief", "rmsprop", "dadapt_adamw")
OTHERS = [name for name in NAMES if name not in PLAIN]
# In pairs, under one of the two.
PAIRS = zip(OTHERS[::2], [*OTHERS[1::2], "sgd"], strict=True)
RUN = [(("reset", "residual")[j % 2], *pair) for j, pair in enumerate(PAIRS)]
RUN += [(guard, "adam", "sgd") for guard in GUARDS if guard not in ("reset", "residual")]


@pytest.mark.parametrize(("guard", "learned", "fallback"), RUN)
def test_compiled_and_vmapped_equals_one_by_one(guard, learned, fallback) -> None:
    seeds, cycles, traces = 2, 7 if guard in RELAYS else 2, []  # a trial takes five
    guard = GUARDS[guard](OPTIMIZERS[learned], OPTIMIZERS[fallback])
    keys = jax.random.split(jax.random.key(1), seeds)

    @jax.jit
    @jax.vmap
    def step(state, key):
        traces.append(1)
        return guard.step(state, Objective(key))

    states = jax.vmap(lambda _: guard.init(start()))(keys)
    fast = []
    for _ in range(cycles):
        states, decisions = step(states, keys)
        fast.append((states, decisions))
    assert len(traces) == 1  # the second cycle's state has the types of the first's

    seed = seeds - 1
    with jax.disable_jit():
        state = guard.init(start())
        if cycles == 2:  # from where the first cycle led
            state = jax.tree.map(lambda leaf: leaf[seed], fast.pop(0)[0])
        for states, decisions in fast:
            state, decision = guard.step(state, Objective(keys[seed]))
            fast_one = jax.tree.map(lambda leaf: leaf[seed], (states, decisions))
            close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
            jax.tree.map(close, comparable((state, decision)), comparable(fast_one))


def squares(params, i):
    return jnp.sum(params.weight**2) + params.bias**2


def comparable(tree):
    """Random keys as numbers."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


DTYPES = {"bfloat16": (jnp.bfloat16, jnp.bfloat16), "mixed": (jnp.bfloat16, jnp.float32)}


# To trace takes its time: each optimizer with each type of parameters, and on either side of two or
# three guards, whose lanes are the same. What is run has float32.
TRACED = [("keep", name, "bfloat16") for name in NAMES]
TRACED += [
    (guard, name, "mixed")
    for g, guard in enumerate(GUARDS)
    for n, name in enumerate(NAMES)
    if (g + n) % 4 == 0
]


@pytest.mark.parametrize(("guard", "name", "dtypes"), TRACED)
def test_a_step_keeps_structure_shapes_and_dtypes(guard, name, dtypes) -> None:
    following = NAMES[(NAMES.index(name) + 1) % len(NAMES)]
    guard = GUARDS[guard](OPTIMIZERS[name], OPTIMIZERS[following])
    state = guard.init(start(DTYPES[dtypes]))
    objective = Objective(jax.random.key(0))
    after, decision = jax.eval_shape(lambda state: guard.step(state, objective), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    before = jax.eval_shape(lambda: state)
    assert jax.tree.leaves(after) == jax.tree.leaves(before)
    assert decision.losses.dtype == decision.learned_loss.dtype == jnp.float32
    assert decision.losses.shape == decision.used_learned.shape == (NT,)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("guard", GUARDS)
def test_low_precision_runs(guard) -> None:
    guard = GUARDS[guard](OPTIMIZERS["adam"], OPTIMIZERS["nesterov"])
    first = state = guard.init(start(DTYPES["mixed"]))
    objective = Objective(jax.random.key(0))
    for _ in range(2):
        state, decision = guard.step(state, objective)
        assert np.isfinite(decision.losses).all()
    before, after = (
        np.mean([float(objective(params, i)) for i in range(100, 105)])
        for params in (first.params, state.params)
    )
    assert after < before


PYTREES = {
    "scalar": jnp.array(1.0),
    "vector": jnp.ones(3),
    "dict": {"a": jnp.ones(2), "b": {"c": jnp.array(2.0)}},
    "tuple": (jnp.ones(1), [jnp.ones((2, 2)), None]),
    "module": start(),
    "numpy": np.ones(3, np.float32),
    "float": 1.0,
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("params", PYTREES.values(), ids=list(PYTREES))
@pytest.mark.parametrize("guard", ["keep", "recommended", "residual", "best of with share"])
def test_parameters_are_any_pytree_of_floats(guard, params) -> None:
    guard = GUARDS[guard](OPTIMIZERS["adam"], OPTIMIZERS["sgd"])

    def objective(params, i):
        return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)), jnp.array(0.0))

    state, _ = guard.step(guard.init(params), objective)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    assert [jnp.shape(leaf) for leaf in jax.tree.leaves(state.params)] == [
        jnp.shape(leaf) for leaf in jax.tree.leaves(params)
    ]
    assert objective(state.params, 0) < objective(params, 0)


@pytest.mark.parametrize("guard", GUARDS)
def test_programs_stay_small_and_convert_nothing_unasked(guard) -> None:
    """What takes long to compile is in them a few times; JAX may refuse to promote ranks, types."""
    objectives, updates = [], []

    def update(gradients, state, params=None):
        updates.append(1)
        return jax.tree.map(jnp.negative, gradients), state

    def objective(params, i):
        objectives.append(1)
        return squares(params, i)

    learned = optax.GradientTransformation(lambda params: (), update)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        made = GUARDS[guard](learned, optax.sgd(R))
        state = made.init(start())
        jax.eval_shape(lambda state: made.step(state, objective), state)
    assert len(objectives) <= 6 and len(updates) <= 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("guard", GUARDS)
def test_numbers_keep_their_types(guard, dtype) -> None:
    """Also where integers are of 64 bits by default: the minibatch's and the counts are of 32."""

    def objective(params, i):
        assert i.dtype == jnp.int32
        return jnp.sum(params**2)

    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        made = GUARDS[guard](optax.sgd(R), optax.sgd(R))
        state = made.init(jnp.ones(2, dtype))
        after, decision = jax.eval_shape(lambda state: made.step(state, objective), state)
    before, after = ([leaf.dtype for leaf in jax.tree.leaves(one)] for one in (state, after))
    assert after == before
    assert decision.losses.dtype == max(dtype, "float32")  # by name
    counts = decision.winner, decision.gradients, decision.forwards, decision.learned_updates
    assert {count.dtype for count in counts} == {jnp.dtype("int32")}


class Counts(NamedTuple):
    """Parameters; what Adam remembers of them has the same fields."""

    count: Any


class Others(NamedTuple):
    """The same under another name."""

    weight: Any


@pytest.mark.parametrize("guard", ["recommended", "reset"])
def test_parameters_may_have_the_name_of_a_schedules_count(guard) -> None:
    made = GUARDS[guard](optax.adam(lambda k: jnp.where(k < 20, 0.3, -0.1)), optax.adam(0.1))

    def objective(params, i):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    inside, ends = {"w": jnp.ones(2), "b": jnp.ones(())}, []
    for kind in (Counts, Others):
        state, _ = lossguard.rollout(made, made.init(kind(inside)), objective, cycles=30)
        ends.append(jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, *ends)


@cache
def counted(name: str):
    """A guard, its step on sum(w^2), and a list that gets an entry each time it is evaluated."""
    # The learned one leads, stalls, and is left: all lanes of a relay run, one after another.
    guard = GUARDS[name](optax.sgd(lambda k: jnp.where(k < 20, 0.2, -0.05)), optax.sgd(0.01))
    calls: list[int] = []

    def objective(params, i):
        jax.debug.callback(lambda i: calls.append(int(i)), i)
        return squares(params, i)

    return guard, jax.jit(lambda state: guard.step(state, objective), donate_argnums=0), calls


@pytest.mark.parametrize("guard", ["recommended", "hedged", "keep", "unguarded"])
def test_an_optimizer_begins_anew_only_where_its_run_does(guard) -> None:
    """So that an ``init`` may be dear, such as one that decomposes matrices."""
    begun: list[str] = []

    def optimizer(name, rate):
        def init(params):
            jax.debug.callback(lambda: begun.append(name))
            return {"scale": jnp.ones(())}

        def update(gradients, state, params=None):
            return optax.tree.scale(-rate, gradients), state

        return optax.GradientTransformation(init, update)

    # The learned one never wins.
    made = GUARDS[guard](optimizer("learned", 0.0), optimizer("fallback", 0.01))
    state, tried = made.init(start()), 0
    step = jax.jit(lambda state: made.step(state, squares))
    for _ in range(60):
        state, decision = step(state)
        tried += int(decision.learned_updates > 0)
    jax.effects_barrier()
    assert begun.count("fallback") == (guard != "unguarded")
    if guard in RELAYS:
        assert 1 < begun.count("learned") <= tried < 30
    else:
        assert begun.count("learned") == 1


SPENT = {
    "keep": (2 * NT, 2 * NC, NT),
    "reset": (2 * NT, 2 * NC, NT),
    "residual": (2 * NT, 0, NT),
    "unguarded": (NT, 0, NT),
    "best of": (3 * NT, 2 * NC, 2 * NT),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_what_is_counted_is_what_is_computed(guard) -> None:
    """A lane that doesn't run costs nothing."""
    made, step, calls = counted(guard)
    calls.clear()
    state = made.init(start())
    minibatches = NT + NC * (guard in ("keep", "reset", "best of"))
    lanes = set()
    for cycle in range(1, 61):
        state, decision = step(state)
        jax.effects_barrier()
        assert len(calls) == decision.gradients + decision.forwards
        assert (state.steps, state.minibatches) == (cycle * NT, cycle * minibatches)
        spent = decision.gradients, decision.forwards, decision.learned_updates
        if guard in SPENT:
            assert spent == SPENT[guard]
        assert float(decision.price()) == pytest.approx(spent[0] + spent[1] / 3)
        with jax.numpy_dtype_promotion("strict"):
            assert decision.price().dtype == jnp.float32
        assert float(decision.price(0.5)) == pytest.approx(spent[0] + spent[1] / 3 + spent[2] / 2)
        lanes.add((int(decision.gradients) // NT, int(decision.learned_updates) // NT))
        calls.clear()
    if guard == "recommended":  # a trial, y alone, the fallback alone, or with s
        assert {(2, 1), (1, 1), (1, 0), (2, 0)} <= lanes
    if guard == "hedged":  # a trial, or y with s; the fallback with s; a trial beside s
        assert lanes == {(2, 1), (2, 0), (3, 1)}
    if guard == "best of with share":
        assert {gradients for gradients, _ in lanes} == {1, 2}


LAST = 2**31 - 1


@pytest.mark.parametrize("guard", GUARDS)
def test_counts_of_32_bits_do_not_become_negative(guard) -> None:
    """Steps stay at the largest number, minibatches begin at 0 again, also within a cycle.

    The state may be donated, and nothing is compiled again.
    """
    made, step, calls = counted(guard)
    calls.clear()
    for to_go in range(NT + NC):  # wherever in a cycle that is
        state = made.init(start())
        state = state._replace(
            steps=jnp.int32(LAST - to_go), minibatches=jnp.int32(LAST - 2 * (NT + NC) - to_go)
        )
        for _ in range(10):
            before, (state, decision) = state, step(state)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
            assert state.steps >= LAST - to_go
            assert state.minibatches >= 0 and jnp.isfinite(decision.losses).all()
        jax.effects_barrier()
        assert min(calls) >= 0 and max(calls) <= LAST
        assert state.steps == LAST and state.minibatches < 10 * (NT + NC)
    assert step._cache_size() == 1


@pytest.mark.parametrize("guard", GUARDS)
def test_parameters_put_into_the_state_are_gone_on_from(guard) -> None:
    """At the start, on trial, and when the learned one leads or has lost."""
    made = GUARDS[guard](optax.sgd(lambda k: jnp.where(k < 20, 0.2, -0.05)), optax.sgd(0.05))
    step = jax.jit(lambda state: made.step(state, squares))
    state = made.init(start())
    for _ in range(20):
        edited = jax.tree.map(lambda leaf: 0.9 * leaf, state.params)
        _, decision = step(state._replace(params=edited))
        if "best of" not in guard or decision.winner == state.inner.leader:
            np.testing.assert_allclose(decision.losses[0], squares(edited, 0), rtol=1e-5)
        state, _ = step(state)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", NAMES)
def test_an_unguarded_step_is_the_optax_loop(name) -> None:
    """Whatever the optimizer wants to be given."""
    extra = {
        "lbfgs": ("value", "grad", "value_fn"),
        "backtracking": ("value", "grad", "value_fn"),
        "polyak_sgd": ("value",),
        "reduce_on_plateau": ("value",),
        "sam": ("grad_fn",),
    }.get(name, ())
    optimizer, objective = OPTIMIZERS[name], Objective(jax.random.key(0))
    guard = lossguard.unguarded(optimizer, nt=3)
    got, decision = guard.step(guard.init(start()), objective)

    def step(params, state, i):
        value, grad = jax.value_and_grad(objective)(params, i)
        args = {
            "value": value,
            "grad": grad,
            "value_fn": lambda params: objective(params, i),
            "grad_fn": lambda params, _: jax.grad(objective)(params, i),
        }
        updates, state = optimizer.update(grad, state, params, **{key: args[key] for key in extra})
        return optax.apply_updates(params, updates), state, value

    params = start()
    state = optimizer.init(params)
    for i in range(3):
        params, state, value = step(params, state, i)
        np.testing.assert_allclose(decision.losses[i], value, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got.params, params)


def test_the_first_arguments_of_an_update_may_have_any_names() -> None:
    """Also those of what a guard gives by name."""

    def update(grad, grad_fn, value=None, **_):
        return jax.tree.map(lambda g: -0.1 * g, grad), grad_fn

    def update_with_value(value_fn, state, params=None, *, value):
        return jax.tree.map(lambda g: -0.1 * g * value / value, value_fn), state

    both = optax.GradientTransformation, optax.GradientTransformationExtraArgs
    for one, kind in product((update, update_with_value), both):
        optimizer = kind(optax.sgd(0.1).init, one)
        guard = lossguard.unguarded(optimizer, nt=1)
        state, _ = guard.step(guard.init(jnp.ones(2)), lambda w, i: jnp.sum(w**2))
        np.testing.assert_allclose(state.params, 0.8 * jnp.ones(2), rtol=1e-6)


@pytest.mark.parametrize("trusted", [False, True])
def test_an_unguarded_step_reports_whose_it_is(trusted) -> None:
    """Also where its last parameters, or one of its losses, are not finite; a mask may be so."""
    params = {"w": jnp.ones(2), "mask": jnp.array([-jnp.inf])}
    for last, lost in ((0.1, None), (jnp.inf, None), (0.1, 1)):
        optimizer = optax.sgd(lambda k, last=last: jnp.where(k == 2, last, 0.1))
        guard = lossguard.unguarded(optimizer, nt=3, trusted=trusted)
        loss = lambda p, i, lost=lost: jnp.sum(p["w"] ** 2) + jnp.where(i == lost, jnp.nan, 0)  # noqa: E731
        _, d = guard.step(guard.init(params), loss)
        assert d.used_learned.tolist() == [not trusted] * 3 and d.winner == trusted
        assert d.learned_updates == (0 if trusted else 3) and d.gradients == 3


def test_states_may_hold_pythons_numbers() -> None:
    def update(updates, count, params=None):
        return jax.tree.map(lambda u: -0.1 * u / (count["step"] + 1), updates), {
            "step": count["step"] + 1
        }

    counting = optax.GradientTransformation(lambda params: {"step": 0}, update)
    guard = lossguard.loss_guard(counting, counting, nt=2, nc=1)
    state = guard.init(jnp.ones(2))
    for _ in range(2):
        state, _ = guard.step(state, lambda w, i: jnp.sum(w**2))
    assert state.inner.fallback["step"] == 4


@pytest.mark.parametrize("guard", GUARDS)
def test_a_state_is_where_the_parameters_were_put(guard) -> None:
    """So that the second cycle finds it where the first one did."""
    guard = GUARDS[guard](OPTIMIZERS["add_noise"], OPTIMIZERS["lstm"])
    device = jax.devices()[0]
    for params, put in ((start(), False), (jax.device_put(start(), device), True)):
        leaves = jax.tree.leaves(guard.init(params))
        assert [leaf.committed for leaf in leaves] == [put] * len(leaves)
        assert all(leaf.devices() == {device} for leaf in leaves)
