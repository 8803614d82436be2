"""The recommended guard has the settings of JAX's."""

import importlib

import numpy as np
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
    if hasattr(value, "looks"):
        d = np.random.default_rng(0).normal(0.2, 1, (50, max(value.looks or (10,))))
        judged = []
        for n in value.looks or (10,):
            of_jax = (
                (d[:, :n],) if "torch" in type(value).__module__ else (jnp.array(d), jnp.int32(n))
            )
            judged += [np.asarray(answer).tolist() for answer in value.test(*of_jax)]
        return value.looks, value.training, judged
    if hasattr(value, "start"):
        state, waits = ProbingState() if ours else init_probing(), []
        for cycle in range(900):
            probed = int(state.left) == 0
            state = value.update(state, number(probed), number(cycle == 7))
            waits += [int(state.wait)] if probed else []
        return value.start, waits
    return value


@pytest.mark.parametrize(
    "options",
    [
        {"nc": 10, "most": 10},
        {"nt": 7, "nc": 1, "most": 1},
        {"nt": 7, "nc": 0, "most": 0},
        {"nt": 2, "nc": 0, "most": 0},
        {"nt": 7, "nc": 6, "most": 40, "loser": "keep"},
    ],
)
def test_the_settings(monkeypatch, options):
    w = [torch.ones(1, requires_grad=True)]
    ours = [torch.optim.SGD(w, lr=lr) for lr in (0.2, 0.1)]
    theirs = [optax.sgd(lr) for lr in (0.2, 0.1)]
    ours = settings(monkeypatch, "lossguard.torch.recommended", "LossGuard", ours, **options)
    theirs = settings(monkeypatch, "lossguard.guards.recommended", "loss_guard", theirs, **options)
    # A stream's minibatches have no numbers; ``cycle`` takes check minibatches of their own.
    assert theirs.pop("checks") == ("next" if options["most"] == options["nc"] else "apart")
    assert ours == theirs


def test_a_stream_takes_nc_check_minibatches_unless_told_otherwise(monkeypatch):
    w = [torch.ones(1, requires_grad=True)]
    made = [torch.optim.SGD(w, lr=0.1) for _ in range(2)]
    of_torch = settings(monkeypatch, "lossguard.torch.recommended", "LossGuard", made, nc=10)
    made = [optax.sgd(0.1)] * 2
    of_jax = settings(monkeypatch, "lossguard.guards.recommended", "loss_guard", made, nc=10)
    assert of_torch["criterion"][:2] == (None, 4)
    assert of_jax["criterion"][:2] == ((10, 20, 40, 80, 160), 0)


def test_without_checks_every_call_trains():
    w = torch.tensor([4.0], requires_grad=True)
    guard = recommended(torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1), nt=4, nc=0)

    def closure():
        assert not guard.checking
        loss = w.square().sum()
        loss.backward()
        return loss

    for _ in range(4):
        guard.step(closure)
    decision = guard.last_decision
    assert (decision.winner, decision.forwards, guard.phase) == (0, 0, 0)
    late = [(4 * (1 - 2 * rate) ** t) ** 2 for rate in (0.4, 0.1) for t in (2, 3)]
    means = sum(late[:2]) / 2, sum(late[2:]) / 2
    assert (decision.learned_loss, decision.fallback_loss) == pytest.approx(means)
    assert guard.cycle(lambda batch: w.square().sum(), range(4)).forwards == 4  # of the ratchet


def test_it_takes_the_guards_options():
    w = torch.tensor([4.0], requires_grad=True)
    seen = []
    learned, fallback = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    guard = recommended(learned, fallback, nt=1, nc=1, callback=seen.append)
    assert isinstance(guard, LossGuard)
    guard.cycle(lambda batch: w.square().sum(), [0], [1])
    assert [decision.winner for decision in seen] == [0]


@pytest.mark.parametrize(("nc", "most"), [(1, 8), (10, 9)])
def test_too_few_check_minibatches(nc, most):
    w = [torch.ones(1, requires_grad=True)]
    made = [torch.optim.SGD(w, lr=0.1) for _ in range(2)]
    with pytest.raises(ValueError, match=f"^nc must be between 2 and most = {most}, .* got {nc}$"):
        recommended(*made, nc=nc, most=most)
