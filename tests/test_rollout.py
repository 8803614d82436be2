"""The one inner loop equals a Python loop, compiles once, and leaves no copies."""

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import lossguard
from lossguard.rollout import KEPT

CYCLES = 4
GUARD = lossguard.loss_guard(optax.adam(0.3), optax.sgd(0.3), nt=3, nc=2)


class Noisy(eqx.Module):
    """A quadratic with noise of its own on each minibatch."""

    key: Array
    target: Array = eqx.field(default_factory=lambda: jnp.ones(4))

    def __call__(self, params, i):
        noise = jax.random.normal(jax.random.fold_in(self.key, i), params.shape)
        return jnp.sum((params - self.target) ** 2) / 2 + 0.15 * jnp.sum(noise * params)


def noisy(seed: int) -> Noisy:
    return Noisy(jax.random.key(seed))


def assert_close(one, other) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_it_is_a_loop() -> None:
    objective = noisy(0)
    state, decisions = GUARD.init(jnp.zeros(4)), []
    step = jax.jit(GUARD.step)
    for _ in range(CYCLES):
        state, decision = step(state, objective)
        decisions.append(decision)
    got = lossguard.rollout(GUARD, GUARD.init(jnp.zeros(4)), objective, cycles=CYCLES)
    assert_close(got, (state, stack(decisions)))


def test_seeds_side_by_side() -> None:
    """Each with parameters and minibatches of its own, on the same problem."""
    seeds = range(3)
    starts = [jnp.full(4, float(seed)) for seed in seeds]
    alone = [
        lossguard.rollout(GUARD, GUARD.init(start), noisy(seed), cycles=CYCLES)
        for seed, start in zip(seeds, starts, strict=True)
    ]

    def one(start, key):
        objective = eqx.tree_at(lambda objective: objective.key, noisy(0), key)
        return lossguard.rollout(GUARD, GUARD.init(start), objective, cycles=CYCLES)

    together = jax.vmap(one)(jnp.stack(starts), stack([noisy(seed).key for seed in seeds]))
    assert together[1].losses.shape == (3, CYCLES, 3)
    assert_close(together, stack(alone))


class Counted(eqx.Module):
    """Says when it is traced."""

    target: Array
    say: Callable[[None], None] = eqx.field(static=True)

    def __call__(self, params, i):
        self.say(None)
        return jnp.sum((params - self.target) ** 2)


def test_new_data_of_the_same_shape_is_not_compiled_for() -> None:
    traces: list = []
    state, _ = lossguard.rollout(
        GUARD, GUARD.init(jnp.ones(4)), Counted(jnp.zeros(4), traces.append), cycles=2
    )
    once = len(traces)
    state, _ = lossguard.rollout(GUARD, state, Counted(jnp.zeros(4), traces.append), cycles=2)
    state, _ = lossguard.rollout(GUARD, state, Counted(5 * jnp.ones(4), traces.append), cycles=2)
    assert len(traces) == once
    assert jnp.sum((state.params - 5) ** 2) < jnp.sum((state.params - 0) ** 2)


def test_it_goes_on_where_it_stopped_and_fewer_cycles_are_not_compiled_for(caplog) -> None:
    """In chunks it is what it is in one piece. To compile each took half a second."""
    objective = noisy(0)
    start, again = (GUARD.init(jnp.ones(4)) for _ in range(2))
    state, decisions = lossguard.rollout(GUARD, start, objective, cycles=5, most=5)
    with jax.log_compiles():
        first, before = lossguard.rollout(GUARD, again, objective, cycles=2, most=5)
        second, after = lossguard.rollout(GUARD, first, objective, cycles=3, most=5)
        assert "Compiling" not in caplog.text
        jax.jit(lambda x: x + len(caplog.text))(1.0)
    assert "Compiling" in caplog.text
    assert before.losses.shape == (2, 3)
    jax.tree.map(np.testing.assert_array_equal, second, state)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), before, after)
    jax.tree.map(np.testing.assert_array_equal, joined, decisions)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cycles": 0, "most": 5}, "cycles must be an integer of at least 1, got 0"),
        ({"cycles": 6, "most": 5}, "cycles must be at most 5, got 6"),
        ({"cycles": 2**31}, "cycles must be at most 2147483647, got 2147483648"),
        ({"cycles": 2.5}, "cycles must be an integer of at least 1, got 2.5"),
        ({"cycles": 2, "most": 2.5}, "most must be an integer of at least 1, got 2.5"),
    ],
)
def test_errors(arguments, message) -> None:
    with pytest.raises(ValueError) as error:
        lossguard.rollout(GUARD, GUARD.init(jnp.ones(4)), noisy(0), **arguments)
    assert str(error.value) == message


def test_buffers_of_the_state_are_donated_and_no_others() -> None:
    objective = noisy(0)
    params = jnp.zeros(4)
    state = GUARD.init(params)
    after, _ = lossguard.rollout(GUARD, state, objective, cycles=1)
    assert state.params.is_deleted()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.inner.learned))
    assert not params.is_deleted()
    assert not objective.target.is_deleted()
    assert not after.params.is_deleted()
    with pytest.raises(ValueError, match=r"^state must be the one that was returned last, got one"):
        lossguard.rollout(GUARD, state, objective, cycles=1)


def test_a_loss_may_hold_what_the_state_does() -> None:
    """And the state may hold it twice: nothing is donated that is still needed."""
    guard = lossguard.unguarded(optax.sgd(0.1), nt=2)
    state = guard.init(jnp.zeros(4))
    state = state._replace(steps=state.minibatches)
    loss = jax.tree_util.Partial(lambda first, w, batch: jnp.sum((w - batch) ** 2) + first)
    loss = jax.tree_util.Partial(loss, state.minibatches)
    state, _ = lossguard.rollout(guard, state, loss, jnp.ones((6, 4)))
    assert loss.args[0] == 0 and state.minibatches == 6


@pytest.mark.usefixtures("unchecked")
def test_numpys_integers_are_counts() -> None:
    guard = lossguard.unguarded(optax.sgd(0.1), nt=2)
    state = guard.init(jnp.zeros(4))
    _, decisions = lossguard.rollout(
        guard, state, lambda w, i: jnp.sum(w**2), cycles=np.int64(2), most=np.int64(4)
    )
    assert decisions.losses.shape == (2, 2)


def test_what_an_objective_holds_goes_with_it() -> None:
    """Save for the last few, whose compiled code is kept."""
    guard, alive = lossguard.unguarded(optax.sgd(0.1)), []
    for k in range(KEPT + 3):

        def objective(params: Any, i: Any, k: int = k) -> Any:
            return jnp.sum((params - k) ** 2)

        alive.append(weakref.ref(objective))
        lossguard.rollout(guard, guard.init(jnp.ones(2)), objective, cycles=1)
    del objective
    gc.collect()
    assert [one() is not None for one in alive] == [False] * 3 + [True] * KEPT


def test_equal_parts_of_other_types_are_not_taken_for_each_other() -> None:
    def objective(scale: Any, params: Any, i: Any) -> Any:
        return jnp.sum(params**2) if scale is True else scale * jnp.sum(params)

    guard = lossguard.unguarded(optax.sgd(0.1))
    for scale, first in ((1.0, 4.0), (True, 8.0), (1, 4.0)):
        start, loss = guard.init(2 * jnp.ones(2)), jax.tree_util.Partial(objective, scale)
        assert lossguard.rollout(guard, start, loss, cycles=1)[1].losses[0, 0] == first


def test_an_objective_that_has_no_hash_is_refused() -> None:
    @dataclasses.dataclass
    class Objective:
        shift: float

        def __call__(self, params: Any, i: Any) -> Any:
            return jnp.sum((params - self.shift) ** 2)

    guard = lossguard.unguarded(optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"^loss and minibatches must be hashable, or pyt.*Objective: "
    ):
        lossguard.rollout(guard, guard.init(jnp.ones(2)), Objective(1.0), cycles=1)


def test_a_guard_that_has_no_hash_is_refused() -> None:
    @dataclasses.dataclass
    class Step:
        of: lossguard.Guard

        def __call__(self, *args: Any) -> Any:
            return self.of.step(*args)

    plain = lossguard.unguarded(optax.sgd(0.1))
    guard = lossguard.Guard(plain.init, Step(plain), plain.per_cycle)
    with pytest.raises(ValueError, match=r"^guard must be of hashable functions, got .*'Step'$"):
        lossguard.rollout(guard, guard.init(jnp.ones(2)), lambda w, i: jnp.sum(w**2), cycles=1)


def test_nothing_is_moved_unasked() -> None:
    guard = lossguard.unguarded(optax.sgd(0.1))
    state = guard.init(jnp.ones(2))
    with jax.transfer_guard("disallow"):
        lossguard.rollout(guard, state, lambda params, i: jnp.sum(params**2), cycles=1)
