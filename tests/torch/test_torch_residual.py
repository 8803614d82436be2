"""GL2O keeps the steps that a scalar calculation says it should."""

import copy
import math
from functools import partial

import pytest
import torch
from models import assert_same_state, backward, quadratic, squares
from torch import nn
from torch.optim import SGD

from lossguard import torch as guards

ResidualGuard = partial(guards.ResidualGuard, model=None)


class Scripted(SGD):
    """SGD whose learning rates are given one by one."""

    def __init__(self, params, rates):
        super().__init__(params, lr=1.0)
        self.rates = iter(rates)

    def step(self, closure=None):
        self.param_groups[0]["lr"] = next(self.rates)
        return super().step(closure)


RATES = [0.3, 0.6, 1.1, -60.0, 0.4, -0.2, 0.9, 0.3, 2.0, 0.45]


@pytest.mark.parametrize("theta", [0.9, 0.1])
@pytest.mark.parametrize("alpha", [0.99, 0.5])
def test_quadratic(theta, alpha):
    """F(w) = w^2 / 2 has S(w) = lr w; momentum makes it lr (w + m u), with u before the step."""
    lr, momentum = 0.1, 0.9
    w, u, mu, kept = 3.0, 0.0, 0.3, []
    for rate in RATES:
        y = w - rate * w
        r = abs(lr * (y + momentum * u))
        ok = r <= alpha * mu
        mu = theta * r + (1 - theta) * mu if ok else mu
        u = momentum * u + w
        w = y if ok else w - lr * u
        kept.append(ok)

    weight = torch.tensor([3.0], requires_grad=True, dtype=torch.float64)
    pair = Scripted([weight], RATES), SGD([weight], lr=lr, momentum=momentum)
    guard = ResidualGuard(*pair, alpha=alpha, theta=theta, nt=len(RATES))
    for _ in RATES:
        guard.step(lambda: backward(weight.square().sum() / 2))
    decision = guard.last_decision
    assert decision.used_learned == kept
    assert weight.item() == pytest.approx(w, rel=1e-5)
    assert (decision.gradients, decision.forwards, guard.steps) == (20, 0, 10)
    assert set(kept) == {True, False}


def test_what_a_forward_pass_changes_is_where_the_step_begins():
    """As an embedding's ``max_norm`` does."""
    ends = []
    for guarded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(4, 2, max_norm=0.5), nn.Flatten(), nn.Linear(2, 1))
        alone, x = SGD(model.parameters(), lr=0.1), torch.tensor([[0], [1], [2]])
        guard, learned = alone, SGD(model.parameters(), lr=0.0)
        if guarded:
            guard = guards.ResidualGuard(learned, alone, model=model, nt=1, alpha=1e-6)
        for _ in range(5):
            guard.zero_grad()
            guard.step(lambda model=model, x=x: backward((model(x) - 1).square().mean()))
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_a_fallback_that_does_not_move_at_first_is_no_bound():
    weight, closure = quadratic(1.0)
    fallback = SGD([weight], lr=0.0)
    guard = ResidualGuard(SGD([weight], lr=0.5), fallback, nt=4)
    for step in range(4):
        fallback.param_groups[0]["lr"] = 0.1 * (step > 1)
        guard.step(closure)
    assert guard.last_decision.used_learned == [False, False, True, True]


def test_not_finite_proposals():
    weight = torch.tensor([3.0], requires_grad=True)
    learned, fallback = SGD([weight], lr=1.0), SGD([weight], lr=0.1)
    learned.param_groups[0]["lr"] = math.nan
    guard = ResidualGuard(learned, fallback, nt=1)
    guard.step(lambda: backward(weight.square().sum() / 2))
    assert guard.last_decision.winner == 1
    assert weight.item() == pytest.approx(2.7)
    fallback.param_groups[0]["lr"] = math.inf
    guard.step(lambda: backward(weight.square().sum() / 2))
    assert guard.last_decision.winner == -1
    assert weight.item() == pytest.approx(2.7)


class Rises(SGD):
    """Multiplies the parameters by 1.5."""

    def step(self):
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(1.5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_first_residual_that_is_not_finite_is_no_bound(value):
    for learned, second in ((Rises, False), (partial(SGD, lr=0.3), True)):
        weight = torch.tensor([4.0, 2.0], requires_grad=True)
        guard = ResidualGuard(learned([weight]), SGD([weight], lr=0.1), nt=1)
        calls = []

        def closure(weight=weight, calls=calls):
            loss = backward(weight.square().sum())
            calls.append(1)
            if len(calls) == 1:
                weight.grad.fill_(value)
            return loss

        for _ in range(2):
            guard.step(closure)
        assert [decision.used_learned[0] for decision in guard.history] == [False, second]


def test_steps_that_are_lost_in_rounding_are_no_reason_to_accept():
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    guard = ResidualGuard(Rises([weight]), SGD([weight], lr=1e-4), nt=1)
    closure = squares(weight)
    for _ in range(3):
        guard.step(closure)
    assert guard._mu == 0.0 and torch.equal(weight, torch.ones_like(weight))


def test_residuals_of_complex_parameters_have_both_parts():
    weight = torch.tensor([1j, 2j], requires_grad=True)
    guard = ResidualGuard(SGD([weight], lr=5.0), SGD([weight], lr=0.1), nt=1)
    guard.step(lambda: backward(weight.abs().square().sum()))
    assert not guard.last_decision.used_learned[0]
    assert guard._mu == pytest.approx(0.2 * math.sqrt(5))


@pytest.mark.parametrize("scale", [1e-46, 1.0, 1e40])
def test_residuals_have_the_precision_of_the_parameters(scale):
    """Beyond what single precision holds the better optimizer's steps are accepted as well."""
    w = torch.tensor([1.0, 2.0], dtype=torch.float64).mul(scale).requires_grad_()
    guard = ResidualGuard(SGD([w], lr=0.4), SGD([w], lr=0.1), nt=4)
    closure = squares(w)
    for _ in range(4):
        guard.step(closure)
    assert guard.last_decision.used_learned == 4 * [True]
    torch.testing.assert_close(w.detach() / scale, 0.2**4 * torch.tensor([1.0, 2.0]).double())


def test_a_bad_minibatch_does_not_spoil_the_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    guard = ResidualGuard(*(SGD(model.parameters(), lr=0.1) for _ in range(2)), nt=1, model=model)
    batch = torch.randn(8, 2)

    def closure(factor, fails=False):
        loss = backward(model(factor * batch).square().mean())
        if fails:
            raise KeyError
        return loss

    guard.step(partial(closure, 1.0))
    assert model[1].num_batches_tracked == 1  # though it is evaluated twice
    before = copy.deepcopy(model.state_dict())
    guard.step(partial(closure, math.nan))
    assert guard.last_decision.winner == -1
    with pytest.raises(KeyError):
        guard.step(partial(closure, math.nan, fails=True))
    assert_same_state(model.state_dict(), before)


def test_a_loss_that_is_overwritten_is_the_one_at_x():
    """As a CUDA graph leaves it."""
    w, _ = quadratic(1.0)
    guard = ResidualGuard(SGD([w], lr=0.1), SGD([w], lr=0.1), nt=1)
    static = torch.zeros(())
    loss = guard.step(lambda: static.copy_(backward(w.square().sum()).detach()))
    assert loss.item() == 1.0
    assert guard.last_decision.losses == [1.0] and static < 1


def test_what_it_refuses():
    model = nn.Linear(2, 1)
    pair = SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^ResidualGuard has no lanes\(\) to loop over: use step"):
        next(iter(ResidualGuard(*pair).lanes()))
    pair[0].train = pair[0].eval = lambda: None  # as schedule-free ones have
    with pytest.raises(ValueError, match=r"^optimizers must have no train\(\) and eval\(\), got"):
        ResidualGuard(*pair)
    model.weight.to_local = lambda: model.weight  # as shards have
    with pytest.raises(ValueError, match=r"^parameters must be whole tensors, got sharded ones$"):
        guards.ResidualGuard(*pair, model=model)
