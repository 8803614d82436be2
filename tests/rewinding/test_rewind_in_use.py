"""``rewind`` among other transformations, types and devices, and what it refuses."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lossguard
from lossguard.rewinding.rewind import RewindState

LOSSES = jnp.concatenate([jnp.linspace(3, 1, 150), jnp.full(12, 9.0), jnp.ones(20)])
WINDOW = 64


def guarded(optimizer):
    return lossguard.rewind(optimizer, window=WINDOW)


def play(optimizer, params, losses=LOSSES):
    """The last parameters and state; the gradient is a fixed function of the parameters."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, value):
        params, state = carry
        gradient = jax.tree.map(lambda p: (jnp.sin(p) + 1).astype(p.dtype), params)
        updates, state = optimizer.update(gradient, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), losses)[0]


def states_of(state) -> list[RewindState]:
    found = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, RewindState))
    return [s for s in found if isinstance(s, RewindState)]


PARAMS = {"w": jnp.array([[0.5, -1.0]]), "b": jnp.array(0.25)}
ADAM = optax.adam(0.01)
FORMS = {
    "around a chain": guarded(optax.chain(optax.clip_by_global_norm(1.0), ADAM)),
    "last in a chain": optax.chain(optax.clip_by_global_norm(1.0), guarded(ADAM)),
    "around injected": guarded(
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.01, 0.0, 500))
    ),
    "injected": optax.inject_hyperparams(lambda rate: guarded(optax.adam(rate)))(rate=0.01),
    "around several steps": guarded(
        optax.MultiSteps(ADAM, every_k_schedule=2).gradient_transformation()
    ),
    "around what uses the loss": guarded(
        optax.chain(ADAM, optax.contrib.reduce_on_plateau(patience=1000))
    ),
}

GUARDS = {
    "recommended": lossguard.recommended,
    "hedged": lossguard.hedged,
    "loss_guard": lossguard.loss_guard,
    "residual_guard": lossguard.residual_guard,
    "best_of": lambda one, other: lossguard.best_of(
        [lossguard.unguarded(one), lossguard.unguarded(other)]
    ),
}


@pytest.mark.parametrize(
    ("name", "twice"), [*((name, False) for name in GUARDS), ("best_of", True)]
)
def test_inside_a_guard_it_remembers(name, twice):
    """As an optimizer that begins with NaN in its state, also within another such one."""
    optimizer = lossguard.rewind(optax.adam(0.1))
    guard = GUARDS[name](optax.sgd(1e-3), lossguard.rewind(optimizer) if twice else optimizer)
    state, _ = lossguard.rollout(
        guard, guard.init(jnp.zeros(2)), lambda w, i: jnp.sum((w - 1) ** 2), cycles=10
    )
    assert max(s.calls for s in states_of(state)) == 100


@pytest.mark.parametrize("form", FORMS)
def test_it_goes_back_in_every_form(form):
    params, state = jax.jit(partial(play, FORMS[form]))(PARAMS)
    (state,) = states_of(state)
    assert state.returns == 1 and np.isfinite(params["w"]).all()
    assert state.thrown <= WINDOW + 0.1 * state.calls


def test_in_a_guard_its_optimizer_gets_what_it_wants():
    """A function of the gradient, which optax's opaque SAM names, and ``rewind`` hands on."""
    sam = optax.contrib.sam(optax.sgd(0.05), optax.sgd(0.01), opaque_mode=True)
    guard = lossguard.unguarded(lossguard.rewind(sam))
    state, _ = guard.step(guard.init(jnp.ones(3)), lambda w, i: jnp.sum(w**2))
    assert (jnp.abs(state.params) < 1).all()


def test_it_needs_no_implicit_promotion():
    optimizer, params = lossguard.rewind(optax.sgd(0.1)), jnp.ones(2)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        state = optimizer.init(params)
        optimizer.update(params, state, params, value=jnp.float32(1))


def test_within_several_steps_it_counts_their_ends():
    steps = optax.MultiSteps(guarded(ADAM), every_k_schedule=3)
    optimizer = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    _, state = jax.jit(partial(play, optimizer))(PARAMS, jnp.repeat(LOSSES, 3))
    (state,) = states_of(state)
    assert state.calls == len(LOSSES) and state.returns == 1


def test_a_guard_gives_it_the_loss_within_several_steps():
    several = optax.MultiSteps(guarded(ADAM), every_k_schedule=2)
    guard = lossguard.unguarded(several, nt=10)
    state, _ = guard.step(guard.init(jnp.ones(2)), lambda w, i: jnp.sum(w**2))
    assert states_of(state)[0].calls == 5 and (state.params < 1).all()


def test_compiled_and_not_it_is_the_same():
    losses = LOSSES[150:168]
    one = play(guarded(ADAM), PARAMS, losses)
    with jax.disable_jit():
        other = play(guarded(ADAM), PARAMS, losses)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


def test_vectorized_each_run_goes_back_by_itself():
    factors = jnp.array([1.0, 0.0, 1.0])
    many = jnp.where(LOSSES[None] > 3, LOSSES * factors[:, None], LOSSES)
    both = jax.jit(jax.vmap(partial(play, guarded(ADAM), PARAMS)))(many)
    assert both[1].returns.tolist() == [1, 0, 1]
    alone = jax.jit(partial(play, guarded(ADAM)))
    for row in range(3):
        mine = jax.tree.map(lambda leaf, row=row: leaf[row], both)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), mine, alone(PARAMS, many[row]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    last, state = jax.jit(partial(play, guarded(optax.sgd(0.01))))(params)
    assert state.returns == 1 and last["w"].dtype == dtype
    assert state.alarm.losses.dtype == jnp.float32


def test_gradients_may_be_wider_than_the_parameters():
    params = jnp.ones(3, jnp.bfloat16)
    optimizer = lossguard.rewind(optax.adam(0.01))
    state = optimizer.init(params)
    updates, after = optimizer.update(jnp.ones(3), state, params, value=1.0)
    assert optax.apply_updates(params, updates).dtype == jnp.bfloat16
    types = [[leaf.dtype for leaf in jax.tree.leaves(one)] for one in (state, after)]
    assert types[0] == types[1]


def test_it_compiles_once_donates_and_never_waits_for_the_host():
    optimizer = guarded(ADAM)
    step = jax.jit(
        lambda params, state, value: optimizer.update(params, state, params, value=value),
        donate_argnums=1,
    )
    state = optimizer.init(PARAMS)
    value = jnp.float32(1)
    _, state = step(PARAMS, state, value)
    with jax.transfer_guard("disallow"):
        _, state = step(PARAMS, state, value)
    assert step._cache_size() == 1
    assert state.calls == 2


def test_a_step_that_takes_no_snapshot_copies_none():
    """In a compiled loop: copies stand only in the inner loop that runs at the end of a block."""
    size = 12345
    params = jnp.zeros(size)
    program = jax.jit(partial(play, guarded(optax.sgd(0.1)))).lower(params).compile().as_text()
    parts = re.split(r"\n(?=%|ENTRY)", program)
    step = [part for part in parts if " while(" in part and not part.startswith("ENTRY")]
    assert step and not any(re.search(rf"f32\[{size}\]\S* copy\(", part) for part in step)
