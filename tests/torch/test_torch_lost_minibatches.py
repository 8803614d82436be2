"""Minibatches on which no lane has a finite loss: they are passed over, and decide nothing."""

import math

import pytest
import torch
from models import backward
from torch import nn
from torch.optim import SGD

from lossguard.torch import BestOf, Recommended
from lossguard.torch.guards.decision import Trial


class Rule(torch.optim.Optimizer):
    """Sets each parameter to a function of it and of its gradient."""

    def __init__(self, params, rule):
        super().__init__(params, {"lr": 1.0})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.rule(p, p.grad))


def play(guard, loss_of, steps):
    """The losses that it reports, those that are lost left out."""
    for k in range(steps):
        for lane in guard.lanes():
            lane.step(backward(loss_of(k)))
    losses = [loss for decision in guard.history for loss in decision.losses]
    return [loss if math.isfinite(loss) else 0.0 for loss in losses]


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_in_a_trial_they_cancel(lost):
    """A loss that only one lane has lost decides nothing, all of a cycle decide."""
    y, z, start = [1.0, 2.0, 9.0, 5.0], [2.0, 2.5, 0.0, 5.5], Trial(length=1, bound=math.inf)
    one_of_y, one_of_z = [*y[:2], lost, y[3]], [*z[:2], lost, z[3]]
    both = start.after(one_of_y, one_of_z)
    assert (both.pairs, both.total, both.size) == (2, -0.5, 0.5)
    assert not start.after(y, one_of_z).outcome(y, one_of_z)[0]
    assert start.after(y, [lost] * 4).outcome(y, [lost] * 4) == (True, False)
    assert start.after([lost] * 4, z).outcome([lost] * 4, z) == (False, True)


def test_x_goes_back_to_s_where_only_s_has_a_finite_loss():
    """The learned optimizer leads to where the curve is too steep for the fallback."""
    w = nn.Parameter(torch.tensor([0.0, 0.001]))

    def loss_of(_):
        u, v = w
        loss = 3 - 2 * u.clamp(max=1) + (1 + 99 * u.clamp(0, 1)) * v**2 / 2
        return loss if v.abs() <= 1e3 else loss * math.nan

    def learned(p, _):
        return p + torch.tensor([0.05 if p[0] < 1 else 0.0, 0.0])

    def fallback(p, g):
        return p + torch.tensor([0.001, -0.1 * g[1]])

    guard = Recommended(Rule([w], learned), Rule([w], fallback), model=None)
    play(guard, loss_of, 600)
    winners = [decision.winner for decision in guard.history]
    finite = [all(map(math.isfinite, one.losses)) for one in guard.history]
    broke = finite.index(False)
    assert 0 in winners[:broke] and 2 in winners[broke + 1 : broke + 6]
    assert loss_of(0).isfinite()


@pytest.mark.parametrize("share", [None, 0.05])
@pytest.mark.parametrize("held_out", [False, True])
def test_best_of_decides_by_the_others(share, held_out):
    """One of three minibatches is lost."""
    w = nn.Parameter(torch.zeros(2))

    def loss_of(k):
        return (w - 1).square().sum() * (math.nan if k % 3 == 1 else 1)

    check = {"check": loss_of, "nc": 3} if held_out else {}
    guard = BestOf([SGD([w], lr=lr) for lr in (1e-6, 0.1)], model=None, share=share, **check)
    play(guard, loss_of, 300)
    assert guard.last_decision.winner == 1 and all(math.isfinite(r.mean) for r in guard.records)
    torch.testing.assert_close(w.detach(), torch.ones(2), rtol=0, atol=1e-3)


def test_the_price_is_bounded_where_all_are_lost():
    w = nn.Parameter(torch.ones(2))
    guard = Recommended(SGD([w], lr=0.2), SGD([w], lr=0.0), model=None, nt=1)
    play(guard, lambda k: w.square().sum() * (math.inf if k >= 5 else 1), 900)
    spent = sum(decision.gradients for decision in guard.history)
    assert spent <= 1.05 * 900 + math.sqrt(900) + 30 and w.isfinite().all()


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("kind", [Recommended, BestOf])
def test_inputs_that_are_not_finite_leave_batch_norm_and_the_run_as_they_are(
    kind, elsewhere, monkeypatch
):
    """In their forward pass its statistics become NaN, which would lose the whole cycle."""
    if elsewhere:  # as on another device, whose flags nobody waits for
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    pair = torch.optim.Adam(model.parameters(), lr=0.03), SGD(model.parameters(), lr=0.05)
    guard = kind(list(pair), model=model) if kind is BestOf else kind(*pair, model=model)
    losses = []
    for k in range(200):
        x = torch.randn(64, 3)
        t = x.sum(1, keepdim=True)
        if k % 10 == 3:
            x[0, 0] = math.nan
        for lane in guard.lanes():
            loss = nn.functional.mse_loss(model(x), t)
            lane.step(backward(loss))
        losses.append(loss.item())
    assert [k for k, loss in enumerate(losses) if math.isnan(loss)] == list(range(3, 200, 10))
    assert losses[-1] < 0.1 * losses[0] and all(b.isfinite().all() for b in model.buffers())
