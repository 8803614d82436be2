"""What the tests of ``Rewind`` share: models, and runs that go wrong."""

import math

import numpy as np
import torch
from torch import nn

from lossguard.torch import Rewind

NOISE = np.random.default_rng(0).standard_normal(4000)


def one_weight(optimizer=torch.optim.SGD, **settings):
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model, optimizer(model.parameters(), **{"lr": 1.0} | settings)


def watched(*optimizer, every=4, options=None, **settings):
    """A ``Rewind`` of one weight, the model and its optimizer."""
    model, optimizer = one_weight(*optimizer, **settings)
    return Rewind(model, optimizer, every=every, **(options or {})), model, optimizer


def calm(count, level=1.0, first=0):
    """Losses around a level."""
    return [level + 0.1 * noise for noise in NOISE[first : first + count]]


def drive(rewind, model, optimizer, losses, gradient=1.0):
    """Steps that each move the weight by -1, at the full rate."""
    for loss in losses:
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        rewind.observe(loss)


def hurt(rewind, model, optimizer, steps, since=160, height=1.0, **given):
    """Steps whose losses are higher while the weight is beyond where it was at step ``since``."""
    for k in range(steps):
        worse = height * (model.weight.item() <= -since)
        drive(rewind, model, optimizer, calm(1, 1.0 + worse, first=300 + k), **given)


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    return model, optimizer


def minibatch(i):
    rng = torch.Generator().manual_seed(i)
    x = torch.randn(32, 8, generator=rng)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


FAULT = range(200, 232)
"""Steps that go up."""


def train(model, optimizer, rewind, first, last, fault=()):
    loss = torch.zeros(())
    for i in range(first, last):
        x, t = (one.to(next(model.parameters()).device) for one in minibatch(i))
        loss = nn.functional.cross_entropy(model(x), t)
        optimizer.zero_grad()
        (loss * (-1 if i in fault else 1)).backward()
        optimizer.step()
        rewind.observe(loss)
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


def hostile_run(seed, every, steps=1200, rho=0.05):
    """The largest excess over the budget, how often the model wasn't finite after a read, and the
    ``Rewind``.

    Steps that led to where the run is are counted in a buffer of the model, which goes back with
    it.
    """
    rng = np.random.default_rng(seed)
    kind = ("broken", "saw", "rare", "all")[seed % 4]
    moves = rng.standard_normal(steps)
    values = 0.1 * rng.standard_normal(steps)
    if kind in ("broken", "all"):
        at = rng.random(steps) < (1.0 if kind == "all" else 0.1)
        moves[at] = rng.choice([np.nan, np.inf, -np.inf], at.sum())
    if kind == "saw":
        values += 100 * (np.arange(steps) % 120 >= 60)
    if kind == "rare":
        values[rng.random(steps) < 0.3] = np.nan
        moves[rng.random(steps) < 0.01] = np.nan
    model, _ = one_weight()
    model.register_buffer("taken", torch.zeros((), dtype=torch.float64))
    optimizer = Hostile(model.parameters(), moves)
    rewind = Rewind(model, optimizer, every=every, rho=rho)
    excess, infinite = -math.inf, 0
    for k, value in enumerate(values):
        optimizer.step()
        model.taken += 1
        rewind.observe(value)
        if not rewind._run.on_trial:
            assert k + 1 - model.taken == rewind.discarded
        spent = rewind.discarded - rewind._run.response.broken
        excess = max(excess, spent - rho * rewind.calls - 256)
        infinite += not rewind._unread and not bool(model.weight.isfinite().all())
    return excess, infinite, rewind
