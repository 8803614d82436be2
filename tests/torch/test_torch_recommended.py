"""The recommended guard has the settings of JAX's."""

import importlib

import pytest
import torch

from lossguard.torch import LossGuard, Probing, recommended
from lossguard.torch.probing import ProbingState

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from lossguard.guards.probing import init_probing  # noqa: E402


def settings(monkeypatch, module, guard, optimizers, **options):
    """What ``recommended`` passes on, where the rule for probes becomes what it answers."""
    seen = {}
    module = importlib.import_module(module)
    make = getattr(module, guard)

    def spy(*optimizers, **options):
        seen.update(options)
        return make(*optimizers, **options)

    monkeypatch.setattr(module, guard, spy)
    module.recommended(*optimizers, **options)
    return {name: answers(value) for name, value in seen.items()}


def answers(value):
    ours = isinstance(value, Probing)
    number = (lambda x: x) if ours else jnp.array
    if hasattr(value, "start"):
        state, waits = ProbingState() if ours else init_probing(), []
        for cycle in range(900):
            probed = int(state.left) == 0
            state = value.update(state, number(probed), number(cycle == 7))
            waits += [int(state.wait)] if probed else []
        return value.start, waits
    return value


@pytest.mark.parametrize("options", [{}, {"nt": 7, "nc": 12}])
def test_the_settings(monkeypatch, options):
    w = [torch.ones(1, requires_grad=True)]
    ours = [torch.optim.SGD(w, lr=lr) for lr in (0.2, 0.1)]
    theirs = [optax.sgd(lr) for lr in (0.2, 0.1)]
    ours = settings(monkeypatch, "lossguard.torch.recommended", "LossGuard", ours, **options)
    theirs = settings(monkeypatch, "lossguard.guards.recommended", "loss_guard", theirs, **options)
    assert ours == theirs


def test_it_takes_the_guards_options():
    w = torch.tensor([4.0], requires_grad=True)
    seen = []
    learned, fallback = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    guard = recommended(learned, fallback, nt=1, nc=1, callback=seen.append)
    assert isinstance(guard, LossGuard)
    guard.cycle(lambda batch: w.square().sum(), [0], [1])
    assert [decision.winner for decision in seen] == [0]
