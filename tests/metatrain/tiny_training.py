"""A meta-training of few and small steps, and how tests stop one."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jaxtyping import PyTree

from lossguard.metatrain import loop
from lossguard.metatrain.bptt import LSTMTraining
from lossguard.tasks import MLP

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
