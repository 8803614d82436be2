"""A small problem that the tests train on, and what several of them ask of a guard there."""

import copy
import io
import math

import torch
from torch import nn
from torch.optim import SGD


def spiral(n=16):
    """Two interleaved arms."""
    t = torch.rand(n, 1) * 9 + 0.5
    label = torch.randint(0, 2, (n,))
    angle = t + math.pi * label[:, None]
    return torch.cat([t * angle.cos(), t * angle.sin()], 1) / 5, label


def minibatches(count=60):
    torch.manual_seed(3)
    return [spiral(16) for _ in range(count)]


def mlp(*extra):
    """Two inputs, 16 hidden units, two classes; ``extra`` comes before the nonlinearity."""
    return nn.Sequential(nn.Linear(2, 16), *extra, nn.Tanh(), nn.Linear(16, 2))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def closure_for(guard, model, batch):
    """What a training loop passes to ``step``."""

    def closure():
        guard.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        return loss

    return closure


def run(guard, model, batches):
    return [guard.step(closure_for(guard, model, batch)) for batch in batches]


def quadratic(w=4.0):
    """F(w) = w^2 has the gradient 2 w: SGD multiplies w by 1 - 2 lr."""
    weight = torch.tensor([w], requires_grad=True)
    return weight, squares(weight)


def squares(*weights):
    """A closure of the sum of all squares."""

    def closure():
        loss = sum(weight.square().sum() for weight in weights)
        loss.backward()
        return loss

    return closure


def assert_same_state(actual, expected):
    """Bit by bit, through nested containers."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same_state(actual[key], expected[key])
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same_state(a, b)
    elif isinstance(actual, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected or (actual != actual and expected != expected)


def assert_resumes(build, model, batches, done):
    """A guard that was saved after some minibatches goes on elsewhere, bit by bit; its history."""
    twin = copy.deepcopy(model)
    guard = build(model)
    run(guard, model, batches[:done])
    file = io.BytesIO()
    torch.save(guard.state_dict(), file)
    losses = run(guard, model, batches[done:])

    file.seek(0)
    resumed = build(twin)  # the guard alone brings the model back too
    torch.randn(7)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(run(resumed, twin, batches[done:]), losses)
    assert_same_state(twin.state_dict(), model.state_dict())
    assert_same_state(resumed.state_dict(), guard.state_dict())
    return guard.history


class Diverges(SGD):
    """Fine for some steps; then one of 1e30, whose square overflows."""

    at, by = 8, 1e30

    def step(self, closure=None):
        loss = super().step(closure)
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken == self.at:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(self.by)
        return loss


class Breaks(Diverges):
    """Its second step leads to infinity."""

    at, by = 2, math.inf
