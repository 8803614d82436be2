"""What errors of a lane leave behind, where its numbers are finite and where they are not."""

import math

import pytest
import torch
from models import Breaks, Diverges, assert_same_state, loss_fn, minibatches, mlp, quadratic
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from lossguard.torch import BestOf, LossGuard, ResidualGuard

NT = 3
NC = {BestOf: {}, LossGuard: {"nc": 1}, ResidualGuard: {}}


class Solves(Diverges):
    """Its first step leads where losses overflow, and the second one raises."""

    at, by = 1, 1e38

    def step(self, closure=None):
        loss = super().step(closure)
        if not all(p.grad.isfinite().all() for p in self.param_groups[0]["params"]):
            raise ArithmeticError("gradients aren't finite")
        return loss


def strict(model, batch):
    """Refuses what isn't finite, as the distributions of PyTorch do."""
    if not model[0].weight.isfinite().all():
        raise ArithmeticError("parameters aren't finite")
    return loss_fn(model, batch)


@pytest.mark.filterwarnings("ignore:learned .*:RuntimeWarning")
@pytest.mark.parametrize("learned", [Solves, Breaks])
@pytest.mark.parametrize("nc", [0, 1])
def test_a_lane_that_raises_for_its_numbers_does_not_stop_the_fallback(learned, nc):
    """Which is the fallback alone, to the bit, its dropout too; over and over again."""
    ends = []
    for guarded in (False, True):
        torch.manual_seed(0)
        model = mlp(nn.Dropout(0.2))
        fallback = Adam(model.parameters(), lr=0.01)
        optimizer = learned(model.parameters(), lr=0.1)
        guard = BestOf(optimizer, fallback, nt=NT, nc=nc) if guarded else fallback
        for number, batch in enumerate(minibatches(6 * (NT + nc))):

            def closure(batch=batch, guard=guard, model=model):
                guard.zero_grad()
                loss = strict(model, batch)
                loss.backward()
                return loss

            if guarded or number % (NT + nc) < NT:
                guard.step(closure)
            else:
                strict(model, batch)
            optimizer.taken = 0 if number % (NT + nc) == NT - 1 else getattr(optimizer, "taken", 0)
        ends.append((model.state_dict(), fallback.state_dict(), torch.rand(1)))
    assert_same_state(*ends)
    assert [decision.winner for decision in guard.history] == [1] * 6
    assert not any(decision.finite_learned for decision in guard.history)


@pytest.mark.filterwarnings("ignore:learned .*:RuntimeWarning")
@pytest.mark.parametrize("kind", [BestOf, LossGuard, ResidualGuard])
@pytest.mark.parametrize("rate", [1e15, 1e38])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_that_are_not_finite_are_reason_enough(kind, rate, scaled):
    """As clip_grad_norm_ refuses them, while the parameters are fine."""
    if kind is ResidualGuard and scaled:
        return
    w, _ = quadratic()
    scaler = {"scaler": GradScaler("cpu", init_scale=1.0)} if scaled else {}
    guard = kind(*(SGD([w], lr=lr) for lr in (rate, 1e-3)), nt=3, **NC[kind], **scaler)

    def closure():
        loss = w.pow(4).sum()
        if scaled:
            guard.scaler.scale(loss).backward()
            guard.unscale_()
        elif not getattr(guard, "checking", False):
            loss.backward()
        if not getattr(guard, "checking", False):
            nn.utils.clip_grad_norm_([w], 1e30, error_if_nonfinite=True)
        return loss

    for _ in range(12):
        guard.step(closure)
    assert {decision.winner for decision in guard.history} == {1}
    expected = 4.0
    for _ in range(9 if kind is LossGuard else 12):
        expected -= 1e-3 * 4 * expected**3
    assert w.item() == pytest.approx(expected, rel=1e-5)


def test_an_error_in_the_middle_of_a_scaled_step_leaves_nothing_behind():
    w, _ = quadratic()
    scaler = GradScaler("cpu", init_scale=1024.0)
    guard = BestOf(SGD([w], lr=0.1), SGD([w], lr=0.01), nt=2, scaler=scaler)
    for call in range(5):

        def closure(call=call):
            loss = w.square().sum()
            guard.scaler.scale(loss).backward()
            guard.unscale_()
            if call == 2:
                raise KeyError
            return loss

        if call == 2:
            with pytest.raises(KeyError):
                guard.step(closure)
        else:
            guard.step(closure)
    assert w.item() == pytest.approx(4 * 0.8**4)


@pytest.mark.parametrize("kind", [BestOf, LossGuard, ResidualGuard])
def test_such_an_error_is_told_once(kind):
    torch.manual_seed(0)
    model, batches = mlp(), minibatches(24)
    guard = kind(
        Breaks(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1), nt=4, **NC[kind]
    )

    def closure(batch):
        loss = strict(model, batch)
        loss.backward()
        return loss

    message = r"^learned \(Breaks\) has numbers that aren't finite and raised Arithm.* left out"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        for number, batch in enumerate(batches):
            guard.learned.taken = number % 4
            guard.step(lambda batch=batch: closure(batch))
    assert len(caught) == 1 and not any(decision.finite_learned for decision in guard.history)


@pytest.mark.parametrize(
    ("kind", "whose"),
    [(kind, "learned") for kind in NC] + [(kind, "fallback") for kind in (BestOf, LossGuard)],
)
def test_other_errors_are_passed_on(kind, whose):
    """Of a lane whose numbers are finite, and of the fallback whatever they are."""
    w, _ = quadratic()
    rates = {"learned": 0.2, "fallback": 0.1} | ({"fallback": 1e38} if whose == "fallback" else {})
    guard = kind(*(SGD([w], lr=rate) for rate in rates.values()), nt=3, **NC[kind])

    def closure():
        loss = w.square().sum()
        if loss < 1 if whose == "learned" else not loss.isfinite():
            raise ArithmeticError
        loss.backward()
        return loss

    with pytest.raises(ArithmeticError):
        for _ in range(9):
            guard.step(closure)
    assert w.isfinite().all()


@pytest.mark.filterwarnings("ignore:learned .*:RuntimeWarning")
@pytest.mark.parametrize("kind", [BestOf, LossGuard])
def test_a_lane_that_is_out_stays_so_in_a_resumed_cycle(kind):
    """It is asked for nothing any more."""
    calls = []
    for resume in (False, True):
        torch.manual_seed(0)
        model, batches, called = mlp(), minibatches(12), []

        def build(model=model):
            optimizers = (cls(model.parameters(), lr=0.1) for cls in (Breaks, SGD))
            return kind(*optimizers, nt=4, **NC[kind])

        def closure(batch, model=model, called=called):
            called.append(bool(model[0].weight.isfinite().all()))
            loss = strict(model, batch)
            loss.backward()
            return loss

        guard = build()
        for number, batch in enumerate(batches):
            if resume and number == 3:
                saved, guard = guard.state_dict(), build()
                guard.load_state_dict(saved)
                guard.learned.taken = Breaks.at
            guard.step(lambda batch=batch, closure=closure: closure(batch))
        calls.append((called, model.state_dict()))
    assert_same_state(*calls)
    assert calls[0][0].count(False) == 1


def test_a_scaler_may_find_no_gradients():
    """A closure may leave the backward pass out where the loss isn't finite."""
    w, _ = quadratic()
    scaler = GradScaler("cpu", init_scale=1.0)
    guard = BestOf(SGD([w], lr=1e30), SGD([w], lr=0.1), nt=2, scaler=scaler)

    def closure():
        loss = w.square().sum()
        if loss.isfinite():
            guard.scaler.scale(loss).backward()
        return loss

    for _ in range(6):
        guard.step(closure)
    assert [decision.winner for decision in guard.history] == [1] * 3
    assert w.item() == pytest.approx(4 * 0.8**6)


@pytest.mark.parametrize("kind", [BestOf, LossGuard])
def test_what_is_infinite_from_the_start_may_not_become_nan(kind):
    class Spoils(SGD):
        def step(self, closure):
            loss = super().step(closure)
            self.param_groups[0]["params"][1].mul_(0.0)
            return loss

    w, closure = quadratic()
    mask = torch.tensor([-math.inf])
    pair = [w, mask.requires_grad_()]
    guard = kind(Spoils(pair, lr=0.2), SGD(pair, lr=0.1), nt=1, **NC[kind])
    for _ in range(4):
        guard.step(closure)
    assert {decision.winner for decision in guard.history} == {1}
    assert mask.item() == -math.inf


@pytest.mark.parametrize("kind", [BestOf, LossGuard, ResidualGuard])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_may_be_infinite_from_the_start(kind, frozen):
    """As a mask is; others have to stay finite."""
    w, _ = quadratic()
    mask = torch.tensor([0.0, -math.inf], requires_grad=not frozen)
    guard = kind(*(SGD([w, mask], lr=rate) for rate in (1e38, 0.1)), nt=2, **NC[kind])

    def closure():
        loss = w.square().sum() + (torch.stack([w, w], 1) + mask).softmax(1)[0, 1]
        loss.backward()
        return loss

    for _ in range(6):
        guard.step(closure)
    assert {decision.winner for decision in guard.history} == {1}
    assert w.item() == pytest.approx(4 * 0.8 ** (4 if kind is LossGuard else 6))
    assert mask.tolist() == [0.0, -math.inf]


def test_an_error_on_the_own_path_leaves_the_schedule_where_it_was():
    """z has stepped it when s, the second lane of the fallback, is shown the rate before."""
    w, descends = quadratic()
    fallback = SGD([w], lr=0.01)
    halves = ExponentialLR(fallback, 0.5)
    guard = LossGuard(SGD([w], lr=0.3), fallback, nt=1, nc=1, hedge=True, schedulers=[halves])
    calls = []

    def closure(fails=False):
        calls.append(0)
        if fails and len(calls) == 3:  # y, z, s
            raise KeyError
        return descends()

    for _ in range(2):
        guard.step(closure)
    assert guard.last_decision.winner == 0 and halves.last_epoch == 1
    calls.clear()
    with pytest.raises(KeyError):
        guard.step(lambda: closure(fails=True))
    assert halves.last_epoch == 2 and fallback.param_groups[0]["lr"] == 0.01 / 4
