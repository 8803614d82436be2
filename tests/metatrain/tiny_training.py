"""A meta-training of few and small steps, and how tests stop one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree
from optax import GradientTransformation

from lossguard.metatrain import loop
from lossguard.metatrain.bptt import LSTMTraining
from lossguard.tasks import MLP, Task

TINY = LSTMTraining(
    name="tiny",
    dataset="digits",
    model=MLP(hidden=(5,)),
    batch_size=16,
    optimizees=2,
    truncation=4,
    shortest=4,
    longest=12,
    meta_steps=6,
    hidden=4,
    layers=1,
    validate_every=2,
    validation_steps=8,
    validation_optimizees=3,
    scale=0.05,
    p=8.0,
)


def same(a: PyTree, b: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def mean_loss(task: Task, optimizer: GradientTransformation, keys: Any, steps: int) -> np.floating:
    """Of rollouts from pairs of keys, for parameters and minibatches, by a plain loop."""
    slope = jax.jit(lambda key, *at: jax.value_and_grad(task.objective(key))(*at))
    update, losses = jax.jit(optimizer.update), []
    for init_key, order_key in keys:
        params = task.init(init_key)
        state = optimizer.init(params)
        for i in range(steps):
            loss, gradient = slope(order_key, params, i)
            updates, state = update(gradient, state, params)
            params = jax.tree.map(jnp.add, params, updates)
            losses.append(loss)
    return np.mean(losses)


def stopping(monkeypatch: pytest.MonkeyPatch, at: int, stop: Callable[[], None]) -> list[int]:
    """Have something happen within a meta-step; returns the list of those that are done."""
    step, done = loop._meta_step, []

    def stepped(*arguments: Any) -> Any:
        done.append(int(arguments[-1]))
        if len(done) == at:
            stop()
        return step(*arguments)

    monkeypatch.setattr(loop, "_meta_step", stepped)
    return done
