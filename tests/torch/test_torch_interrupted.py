"""What becomes of the model where a call does not come to its end."""

import copy
import math

import pytest
import torch
from models import (
    KINDS,
    assert_same_state,
    backward,
    check_of,
    closure_for,
    loss_fn,
    minibatches,
    mlp,
    refuses,
    run,
    spiral,
    two,
)
from torch import nn
from torch.optim import SGD

from lossguard.torch import BestOf, LossGuard, Recommended
from tests.campaigns.interrupts import interrupted


class Breaks(SGD):
    """Its second step leads to infinity."""

    taken = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.taken += 1
        if self.taken == 2:
            for p in self.param_groups[0]["params"]:
                p.data.add_(math.inf)
        return loss


def normed():
    return mlp(nn.BatchNorm1d(16), nn.Dropout(0.2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_leaves_the_model_as_it_was(kind, fails_at):
    """In the first lane that runs, and in the live one, which runs last."""
    model = normed()
    guard = two(kind, model, nt=4)
    run(guard, model, minibatches(2))
    before, draws, calls = copy.deepcopy(model.state_dict()), torch.get_rng_state(), 0

    def fails():
        nonlocal calls
        calls += 1
        loss = closure_for(guard, model, spiral())()
        if calls == fails_at:
            raise KeyError("mine")
        return loss

    batch = spiral()
    with pytest.raises(KeyError, match="mine"):
        guard.step(fails)
    assert_same_state(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    if fails_at == 1:
        assert guard.phase == 2
    torch.set_rng_state(draws)
    guard.step(closure_for(guard, model, batch))
    run(guard, model, minibatches(20))
    assert guard.history


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["learned", "fallback"])
def test_an_error_of_an_optimizer_leaves_the_model_as_it_was(kind, of):
    """Its buffers too, which the forward pass has changed."""

    class Raises(SGD):
        def step(self, closure=None):
            if bad:
                raise KeyError("mine")
            return super().step(closure)

    model, bad = normed(), False
    guard = two(kind, model, **{of: lambda ps: Raises(ps, lr=0.1)}, nt=4)
    run(guard, model, minibatches(2))
    before, bad = copy.deepcopy(model.state_dict()), True
    with pytest.raises(KeyError, match="mine"):
        run(guard, model, minibatches(20))
    assert_same_state(model.state_dict(), before)
    bad = False
    run(guard, model, minibatches(20))
    assert guard.history


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 1])
def test_a_body_that_is_left_counts_as_an_error(kind, at):
    model = normed()
    guard = two(kind, model, nt=4)
    run(guard, model, minibatches(1))
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        for k, lane in enumerate(guard.lanes()):
            loss = backward(loss_fn(model, spiral()))
            if k == at:
                break
            lane.step(loss)
        assert_same_state(model.state_dict(), before)
    run(guard, model, minibatches(1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^rates must be set between minibatches, got another"):
        for lane in guard.lanes():
            lane.step(backward(loss_fn(model, spiral())))
            guard.param_groups[0]["lr"] *= 0.5
    guard.param_groups[0]["lr"] *= 2
    assert_same_state(model.state_dict(), before)
    for other in list(guard._optimizers.values()):
        with pytest.raises(ValueError, match=r"^lane.step\(loss\) must make every step while"):
            for lane in guard.lanes():
                loss = backward(loss_fn(model, spiral()))
                other.step()
                lane.step(loss)
        assert_same_state(model.state_dict(), before)
    with pytest.raises(ValueError, match=r"^the body of guard.lanes\(\) must call lane.step\(loss"):
        for _ in guard.lanes():
            pass
    assert_same_state(model.state_dict(), before)
    with refuses("lane.step must be called once for each lane, got again"):
        for lane in guard.lanes():
            loss = backward(loss_fn(model, spiral()))
            lane.step(loss)
            lane.step(loss)
    run(guard, model, minibatches(20))


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_lane_that_raises_for_its_numbers_does_not_stop_the_fallback(kind):
    class Strict(nn.Module):
        """Raises where its input isn't finite, as distributions and decompositions do."""

        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            x = self.net(x)
            if not x.isfinite().all():
                raise ValueError("not finite")
            return x

    model = Strict()
    guard = two(kind, model, lambda ps: Breaks(ps, lr=0.1), lambda ps: SGD(ps, lr=0.1), nt=4)
    with pytest.warns(RuntimeWarning, match=r"numbers that aren't finite and raised ValueError"):
        run(guard, model, minibatches(40))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not all(guard.history[0].used_learned) or kind is BestOf
    with pytest.raises(KeyError):  # other errors are passed on
        guard.step(lambda: {}["loss"])


def test_a_check_that_raises_where_numbers_are_not_finite_loses_that_lane():
    model, held_out = mlp(), minibatches(1)[0]

    def check(k):
        loss = loss_fn(model, held_out)
        if not loss.isfinite():
            raise ValueError("mine")
        return loss

    pair = [SGD(model.parameters(), lr=0.1), Breaks(model.parameters(), lr=0.1)]
    guard = BestOf(pair, model=model, nt=4, check=check)
    with pytest.warns(RuntimeWarning, match=r"numbers that aren't finite and raised ValueError"):
        run(guard, model, minibatches(40))
    assert [one.winner for one in guard.history] == [0] * 10
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_fallback_that_raises_is_not_left():
    model = mlp()
    guard = two(Recommended, model, fallback=lambda ps: Breaks(ps, lr=0.1), nt=4)

    def closure(batch):
        guard.zero_grad()
        loss = loss_fn(model, batch)
        if not loss.isfinite():
            raise ValueError("mine")
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="mine"):
        for batch in minibatches(4):
            guard.step(lambda batch=batch: closure(batch))
    assert all(p.isfinite().all() for p in model.parameters())  # back where the cycle began


@pytest.mark.parametrize("kind", KINDS)
def test_after_ctrl_c_the_model_is_finite_and_a_checkpoint_loads(kind):
    """As in the campaign, all over the package's code that a call runs; it ends a cycle."""
    model, batches = mlp(nn.BatchNorm1d(16)), minibatches(4)
    guard = two(kind, model, nt=2)
    run(guard, model, batches[:3])

    def call():
        guard.step(closure_for(guard, model, batches[3]))

    def places(total):
        return range(1, total, total // 20)

    assert all(interrupted([model, guard], model, call, places))


def test_a_checkpoint_loads_after_checks_that_were_interrupted():
    """It is of the middle of a cycle, in which losses of checks are none."""
    model, stops = mlp(), [False]
    plain = check_of(model)

    def check(k):
        if stops[0] and k == 1:
            raise KeyboardInterrupt
        return plain(k)

    guard, batches = two(LossGuard, model, nt=2, check=check, nc=2), minibatches(2)
    run(guard, model, batches[:1])
    state = guard.state_dict()
    stops[0] = True
    with pytest.raises(KeyboardInterrupt):
        run(guard, model, batches[1:])
    stops[0] = False
    guard.load_state_dict(state)
    run(guard, model, batches[1:])
    assert len(guard.history) == 1
