"""What the tests of ``Rewind`` share: models, and runs that go wrong."""

import math

import numpy as np
import torch
from torch import nn

from lossguard.torch import Rewind

FALLS = list(np.linspace(3, 1, 128))
HIGH = [9.0] * 16
WINDOW = 64


def one_weight(optimizer=torch.optim.SGD, **settings):
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model, optimizer(model.parameters(), **{"lr": 1.0} | settings)


def watched(*optimizer, every=4, **settings):
    """A ``Rewind`` of one weight, the model and its optimizer."""
    model, optimizer = one_weight(*optimizer, **settings)
    return Rewind(model, optimizer, window=WINDOW, every=every), model, optimizer


def drive(rewind, model, optimizer, losses, gradient=1.0, after=lambda: None):
    for loss in losses:
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        after()
        rewind.observe(loss)


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer


def train(model, optimizer, rewind, first, last, fault=()):
    for i in range(first, last):
        rng = torch.Generator().manual_seed(i)
        x = torch.randn(32, 8, generator=rng).to(next(model.parameters()).device)
        t = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        loss = nn.functional.cross_entropy(model(x), t)
        optimizer.zero_grad()
        (loss * (-300 if i in fault else 1)).backward()
        optimizer.step()
        rewind.observe(loss * (20 if i in fault else 1))
    return loss.item()


def assert_same(one, other):
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)


class Hostile(torch.optim.Optimizer):
    """Its steps are what a list says."""

    def __init__(self, params, steps):
        super().__init__(params, {"lr": 1.0})
        self.steps = iter(steps)

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param += self.param_groups[0]["lr"] * next(self.steps)


def hostile_run(seed, every, checks, steps=1200, rho=0.05):
    """The largest excess over the budget, and how often the model wasn't finite after a read.

    Steps that were undone are counted in a buffer of the model, which goes back with it.
    """
    rng = np.random.default_rng(seed)
    kind = ("broken", "saw", "rare", "all")[seed % 4]
    moves = rng.standard_normal(steps)
    values = rng.standard_normal(steps)
    if kind in ("broken", "all"):
        at = rng.random(steps) < (1.0 if kind == "all" else 0.1)
        moves[at] = rng.choice([np.nan, np.inf, -np.inf], at.sum())
    if kind == "saw":
        values += 100 * (np.arange(steps) % 60 >= 40)
    if kind == "rare":
        values[rng.random(steps) < 0.3] = np.nan
        moves[rng.random(steps) < 0.01] = np.nan
    model, _ = one_weight()
    model.register_buffer("taken", torch.zeros((), dtype=torch.float64))
    optimizer = Hostile(model.parameters(), moves)
    rewind = Rewind(model, optimizer, window=WINDOW, every=every, rho=rho)
    excess, infinite, taken = -math.inf, 0, 0
    for value in values:
        optimizer.step()
        alone = rewind._last is not None and not bool(model.weight.isfinite())
        taken += not alone  # or it is taken back by itself
        model.taken += not alone
        rewind.observe(value)
        assert taken - model.taken == rewind.thrown
        excess = max(excess, rewind.thrown - rho * rewind.calls - WINDOW)
        infinite += not rewind._unread and not bool(model.weight.isfinite().all())
    checks.append((rewind.returns, rewind.skipped, rewind.thrown))
    return excess, infinite
