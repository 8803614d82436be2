"""Host-fed minibatches as an objective."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lossguard


def loss(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def batches(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 8, 3)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(x.sum(axis=2))


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_it_is_the_loss_on_minibatch_i(kind) -> None:
    x, y = map(kind, batches(6))
    objective = lossguard.stacked(loss, (x, y), start=10)
    for i in range(10, 16):
        assert objective(jnp.ones(3) / 2, i) == loss(jnp.ones(3) / 2, (x[i - 10], y[i - 10]))


@pytest.mark.parametrize("i", [9, 12])
def test_beyond_the_stack_the_loss_is_nan(i) -> None:
    """Where JAX would take the nearest minibatch there is, and a check would see it twice."""
    objective = lossguard.stacked(loss, batches(2), start=10)
    assert jnp.isnan(objective(jnp.ones(3), i)) and jnp.isfinite(objective(jnp.ones(3), 11))
    guard = lossguard.loss_guard(optax.sgd(0.1), optax.sgd(0.1), nt=1, nc=1)
    state = guard.init(jnp.ones(3))._replace(minibatches=jnp.int32(11))
    after, decision = guard.step(state, objective)
    assert decision.winner == -1 and jnp.array_equal(after.params, state.params)


def test_a_loop_fed_from_the_host_is_the_loop_on_the_device() -> None:
    """New minibatches every cycle don't compile anew; their start may be donated with the state."""
    nt, nc, cycles = 3, 2, 4
    guard = lossguard.loss_guard(optax.adam(0.1), optax.sgd(0.1), nt=nt, nc=nc)
    x, y = batches(cycles * (nt + nc))
    traces = []

    @partial(jax.jit, donate_argnums=0)
    def step(state, objective):
        traces.append(1)
        return guard.step(state, objective)

    state = guard.init(jnp.zeros(3))
    for cycle in range(cycles):
        rows = slice(cycle * (nt + nc), (cycle + 1) * (nt + nc))
        state, _ = step(state, lossguard.stacked(loss, (x[rows], y[rows]), state.minibatches))
    assert len(traces) == 1

    whole, _ = lossguard.rollout(
        guard, guard.init(jnp.zeros(3)), lossguard.stacked(loss, (x, y), 0), cycles=cycles
    )
    np.testing.assert_allclose(state.params, whole.params, rtol=1e-6)


SGD = optax.sgd(0.1)


@pytest.mark.parametrize(
    ("guard", "needed"),
    [
        (lossguard.loss_guard(SGD, SGD, nt=3, nc=2), 5),
        (lossguard.residual_guard(SGD, SGD, nt=3), 3),
        (lossguard.recommended(SGD, SGD, nt=3), 3),
        (lossguard.hedged(SGD, SGD, nt=3), 3),
        (lossguard.unguarded(SGD, nt=3), 3),
        (lossguard.best_of([lossguard.unguarded(SGD, nt=3)] * 2), 3),
    ],
)
def test_a_stack_that_is_shorter_than_a_cycle(guard, needed) -> None:
    state = guard.init(jnp.zeros(3))
    message = f"^stacked minibatches must be at least {needed}, which a cycle may take, got "
    with pytest.raises(ValueError, match=message + f"{needed - 1}$"):
        guard.step(state, lossguard.stacked(loss, batches(needed - 1), 0))
    after, _ = jax.jit(guard.step)(state, lossguard.stacked(loss, batches(needed), 0))
    assert jnp.isfinite(after.params).all() and not jnp.array_equal(after.params, state.params)


@pytest.mark.parametrize("name", ["recommended", "hedged", "residual_guard"])
def test_beyond_the_stack_x_stays_whatever_the_optimizer_remembers(name) -> None:
    """Momentum would go on, though the gradient is NaN there."""
    momentum = optax.sgd(0.01, momentum=0.9)
    guard = getattr(lossguard, name)(optax.adam(0.1), momentum, nt=2)
    objective = lossguard.stacked(loss, batches(12), start=0)
    state, _ = lossguard.rollout(guard, guard.init(jnp.zeros(3)), objective, cycles=6)
    x = np.asarray(state.params)
    state, _ = lossguard.rollout(guard, state, objective, cycles=5)
    np.testing.assert_array_equal(state.params, x)
