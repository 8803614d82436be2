"""What ``Rewind`` does in steps: a part of the rate, and gradients that have passed a gate."""

import math

import numpy as np
import pytest
import torch
from rewinding import calm, drive, watched
from torch import nn
from torch.optim import lr_scheduler

from lossguard.torch.rewind.gradients import Gate, gated


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.99), 0.99**20),
        (lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [12], 0.5), 0.5),
        (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 + 0.5 * (k < 12)), 0.5),
    ],
)
def test_a_scheduler_in_a_hook_goes_on_from_its_own_rates(make, rate):
    """Also from one that it sets where careful steps are at about that rate."""
    rewind, model, optimizer = watched()
    scheduler = make(optimizer)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    rewind._steps.scale = 0.5
    before = model.weight.item()
    drive(rewind, model, optimizer, calm(1))
    assert before - model.weight.item() == 0.5
    rewind._steps.scale = 0.5
    drive(rewind, model, optimizer, calm(19))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


class Decays(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * param.grad
            group["lr"] *= 0.99


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_careful_step_leaves_the_rate_as_it_was(as_tensor):
    """Also where it changes the rate itself, as other steps may."""
    lr = torch.tensor(1.0, dtype=torch.float64) if as_tensor else 1.0
    rewind, model, optimizer = watched(Decays, lr=lr)
    (group,) = optimizer.param_groups
    drive(rewind, model, optimizer, calm(4))
    assert float(group["lr"]) == pytest.approx(0.99**4)
    rewind._steps.scale, before = 0.25, model.weight.item()
    drive(rewind, model, optimizer, calm(1))
    assert float(group["lr"]) == pytest.approx(0.99**4)
    assert before - model.weight.item() == pytest.approx(0.25 * 0.99**4)


@pytest.mark.parametrize("how", ["save", "close"])
def test_an_error_in_a_careful_step_leaves_no_lowered_rate(how):
    class Stopped(torch.optim.SGD):
        def step(self, closure=None):
            raise KeyboardInterrupt

    rewind, model, optimizer = watched(Stopped)
    rewind._steps.scale = 0.5
    with pytest.raises(KeyboardInterrupt):
        drive(rewind, model, optimizer, calm(1))
    if how == "save":
        assert optimizer.state_dict()["param_groups"][0]["lr"] == 1
    rewind.close()
    assert optimizer.param_groups[0]["lr"] == 1


def test_a_state_that_is_saved_within_a_careful_step_leaves_it_careful():
    rewind, model, optimizer = watched()
    rewind._steps.scale = 0.5
    optimizer.register_step_pre_hook(lambda *_: optimizer.state_dict() and None)
    drive(rewind, model, optimizer, calm(1))
    assert model.weight.item() == -0.5 and optimizer.param_groups[0]["lr"] == 1


def test_the_limit_is_eight_deviations_and_a_factor_of_eight_above_the_median():
    rng = np.random.default_rng(1)
    for spread in (0.01, 1.0):
        norms = np.exp(3 + spread * rng.standard_normal(200))
        gate = Gate()
        for k in range(0, 200, 8):
            gate.hear(norms[k : k + 8].tolist())
        logs = np.log(norms[-128:])
        middle = np.median(logs)
        deviation = 1.4826 * np.median(np.abs(logs - middle))
        expected = math.exp(middle + max(8 * deviation, math.log(8)))
        assert gate.limit == pytest.approx(expected) and gate.usual == pytest.approx(
            math.exp(middle)
        )


def test_no_more_than_eight_and_one_percent_are_left_out():
    gate, left = Gate(), 0
    gate.hear([1.0] * 32)
    for k in range(5000):
        norm = 1e6 if k % 3 == 0 else 1.0
        left += norm > gate.limit
        gate.hear([norm])
    assert 8 <= left <= 8 + 0.01 * gate.heard + 1
    assert gate.limit < math.inf or left > 8 + 0.01 * gate.heard - 1


def test_a_norm_that_has_risen_for_good_becomes_usual():
    gate = Gate()
    gate.hear([1.0] * 128)
    gate.hear([100.0] * 128)
    assert gate.usual == pytest.approx(100) and gate.limit > 100


def parameters(dtype):
    torch.manual_seed(0)
    made = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (3, 5)]
    for p in made:
        p.grad = torch.randn(len(p), dtype=torch.float64).to(dtype)
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_gradients_that_are_not_finite_or_out_of_line_become_0(dtype, bad):
    params = parameters(dtype)
    flat = torch.cat([p.grad for p in params]).double()
    if bad is not None:
        params[1].grad[2] = bad
    norm, left = gated(params, math.inf, math.inf)
    assert left == (bad is not None)
    assert all(p.grad.any() == (bad is None) for p in params)
    if bad is None:
        assert norm == pytest.approx(flat.norm().item(), rel=0.01)
        _, left = gated(params, 0.9 * norm, math.inf)
        assert left and not any(p.grad.any() for p in params)


def test_gradients_are_clipped_as_pytorch_does_it():
    params, others = parameters(torch.float64), parameters(torch.float64)
    assert gated(params, math.inf, 0.5)[1] is False
    nn.utils.clip_grad_norm_(others, 0.5)
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=0)
    _, left = gated(params, math.inf, 9.0)
    assert left is False and params[0].grad.norm() < 0.5


def test_where_nothing_may_wait_the_same_is_done(monkeypatch):
    """As on a GPU: a norm that tells nothing to the host."""
    for bad in (None, math.nan):
        made = [parameters(torch.float64) for _ in range(2)]
        if bad:
            for params in made:
                params[0].grad[0] = bad
        expected = gated(made[0], math.inf, 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cpu", False)
            norm, left = gated(made[1], math.inf, 0.5)
        assert bool(left) == expected[1]
        torch.testing.assert_close(float(norm), float(expected[0]), equal_nan=True)
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_sparse_and_missing_gradients():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    without = nn.Parameter(torch.ones(2))
    norm, left = gated([table.weight, without], math.inf, math.inf)
    assert norm == 2 and not left
    assert gated([without], math.inf, math.inf) == (0.0, False)


def test_one_gradient_out_of_line_costs_one_step():
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, calm(100))
    before = model.weight.item()
    drive(rewind, model, optimizer, calm(1), gradient=1e4)
    assert model.weight.item() == before
    drive(rewind, model, optimizer, calm(3))
    (event,) = rewind.events
    assert (event.kind, event.cause, event.skipped) == ("skipped", "gradients", 1)
    assert model.weight.item() == before - 3
