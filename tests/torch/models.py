"""A small problem that the tests train on, and what several of them ask of a guard there."""

import copy
import io
import math
import operator
import re
from functools import reduce

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from lossguard.torch import BestOf, LossGuard, Recommended
from lossguard.torch.guards import saving

KINDS = [Recommended, LossGuard, BestOf]


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


def twins(*extra):
    """Two of them that are alike."""
    model = mlp(*extra)
    return model, copy.deepcopy(model)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def backward(loss):
    """The loss, once its gradients are there."""
    loss.backward()
    return loss


def step_by(optimizer, loss):
    """A step of an optimizer by itself; the loss before it."""
    optimizer.zero_grad()
    backward(loss)
    optimizer.step()
    return loss


class Differences(nn.Module):
    """What changed since the last minibatch, which it keeps as it was given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("last", torch.zeros(4, 2))

    def forward(self, x):
        out = self.layer(x - self.last)
        self.last = x
        return out


def quick(lightning, steps, *callbacks, **options):
    """Lightning's trainer, which writes and shows nothing."""
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def closure_for(guard, model, batch):
    """What a training loop passes to ``step``."""

    def closure():
        guard.zero_grad()
        return backward(loss_fn(model, batch))

    return closure


def run(guard, model, batches):
    return [guard.step(closure_for(guard, model, batch)) for batch in batches]


def quadratic(w=4.0):
    """F(w) = w^2 has the gradient 2 w: SGD multiplies w by 1 - 2 lr."""
    weight = torch.tensor([w], requires_grad=True)
    return weight, squares(weight)


def squares(*weights):
    """A closure of the sum of all squares."""
    return lambda: backward(sum(weight.square().sum() for weight in weights))


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
    elif isinstance(actual, bytes):
        host = torch.zeros(())  # as are all of these
        assert_same_state(*(saving.unfolded(one, host) for one in (actual, expected)))
    else:
        assert actual == expected or (actual != actual and expected != expected)


def two(kind, model, learned=None, fallback=None, **options):
    """A guard of Adam over SGD, or of what is given, on a model."""
    learned = learned or (lambda ps: Adam(ps, lr=0.05))
    fallback = fallback or (lambda ps: SGD(ps, lr=0.3, momentum=0.9))
    optimizers = learned(list(model.parameters())), fallback(list(model.parameters()))
    return guard_of(kind, optimizers[:: -1 if kind is BestOf else 1], model, **options)


def guard_of(kind, optimizers, model, **options):
    """A guard of these optimizers."""
    if kind is LossGuard:
        options = {"check": check_of(model), "nc": 2} | options
    return kind(*[optimizers] if kind is BestOf else optimizers, model=model, **options)


def check_of(model, batches=(), loss_fn=loss_fn):
    """The loss on minibatch number k of these, or of some that are drawn by their numbers."""

    def check(k):
        if batches:
            return loss_fn(model, batches[k])
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(1000 + k)
            x, labels = spiral()
        return loss_fn(model, (x.to(next(model.parameters()).dtype), labels))

    return check


def two_rates(kind, weight, *rates, **options):
    """A guard of SGD over SGD on a weight that is in no module."""
    optimizers = [SGD([weight], lr=rate) for rate in rates]
    if kind is LossGuard:
        options = {"check": lambda k: weight.square().sum(), "nc": 1} | options
    return guard_of(kind, optimizers, None, **options)


def refuses(start, end=""):
    """A block that is refused with a sentence that begins like this; "$": that is this."""
    return pytest.raises(ValueError, match=f"^{re.escape(start)}{end}")


def assert_resumes(build, model, batches, done):
    """A guard that was saved after some minibatches goes on elsewhere, bit by bit."""
    twin = copy.deepcopy(model)
    guard = build(model)
    run(guard, model, batches[:done])
    file = io.BytesIO()
    torch.save(guard.state_dict(), file)
    torch.manual_seed(5)
    losses = run(guard, model, batches[done:])

    file.seek(0)
    resumed = build(twin)  # the guard alone brings the model back too
    before = torch.get_rng_state()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.get_rng_state(), before)  # which is the program's
    torch.manual_seed(5)
    assert_same_state(run(resumed, twin, batches[done:]), losses)
    assert_same_state(twin.state_dict(), model.state_dict())
    assert_same_state(resumed.state_dict(), guard.state_dict())
    return guard.history


def algorithm2(model, learned, fallback, batches, *, nt, nc, loser="keep", loss_fn=loss_fn):
    """x and the winner after each cycle of Algorithm 2, by the letter.

    It shares no code with the guard: each branch has a model and an optimizer of its own. Random
    numbers are by the number of the minibatch.
    """
    x, branches = copy.deepcopy(model), [copy.deepcopy(model) for _ in range(2)]
    makers = zip((learned, fallback), branches, strict=True)
    optimizers = [make(list(branch.parameters())) for make, branch in makers]
    fresh = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    stream = enumerate(batches)
    for _ in range(len(batches) // (nt + nc)):
        for branch in branches:
            branch.load_state_dict(x.state_dict())
        checks = [[], []]
        for t in range(nt + nc):
            i, batch = next(stream)
            for branch, optimizer, losses in zip(branches, optimizers, checks, strict=True):
                torch.manual_seed(i)
                buffers = [b.clone() for b in branch.buffers()]
                loss = loss_fn(branch, batch)
                if t < nt:
                    step_by(optimizer, loss)
                    continue
                losses.append(loss.item())
                for buffer, before in zip(branch.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        y, z = (sum(losses) / nc for losses in checks)
        winner = 0 if y < z else 1
        x.load_state_dict(branches[winner].state_dict())
        if loser == "reset":
            optimizers[1 - winner].load_state_dict(copy.deepcopy(fresh[1 - winner]))
        yield copy.deepcopy(x.state_dict()), winner


def assert_is_algorithm2(
    model, learned, fallback, batches, *, nt, nc, loser="keep", loss_fn=loss_fn
):
    """A guarded run has the same winners and parameters; its checks are of the same list."""
    settings = {"nt": nt, "nc": nc, "loser": loser}
    expected = list(algorithm2(model, learned, fallback, batches, loss_fn=loss_fn, **settings))

    def check(k):
        i = k // nc * (nt + nc) + nt + k % nc
        torch.manual_seed(i)
        return loss_fn(model, batches[i])

    guard = two(LossGuard, model, learned, fallback, check=check, **settings)
    states = []
    for i, batch in enumerate(batches):
        if i % (nt + nc) < nt:
            torch.manual_seed(i)
            guard.step(lambda batch=batch: backward(loss_fn(model, batch)))
            if guard.phase == 0:
                states.append(copy.deepcopy(model.state_dict()))
    assert [d.winner for d in guard.history] == [winner for _, winner in expected]
    for ours, (theirs, _) in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Writing(SGD):
    """Its counter is in its group, in a tensor or a list, to which a step writes."""

    def __init__(self, params, lr, counter=torch.zeros):
        super().__init__(params, lr=lr)
        self.param_groups[0]["k"] = counter(1)

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        group["k"][0] += 1
        for p in group["params"]:
            p -= group["lr"] / group["k"][0] * p.grad


WRITTEN = torch.zeros, lambda n: [0] * n
"""What its counter may be in."""


def entries_of(state, path=()):
    """The places of all entries of nested dictionaries and lists."""
    for key in state if isinstance(state, dict) else range(len(state)):
        yield (*path, key)
        if isinstance(state[key], (dict, list)):
            yield from entries_of(state[key], (*path, key))


def refusals_of_damaged(one, state):
    """How often a state that lacks an entry is refused, whole; else it is loaded."""
    there, refused = one.state_dict(), 0
    for *path, last in entries_of(state):
        damaged = copy.deepcopy(state)
        del reduce(operator.getitem, path, damaged)[last]
        try:
            one.load_state_dict(damaged)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            assert_same_state(one.state_dict(), there)
            refused += 1
        else:
            one.load_state_dict(there)
    return refused
