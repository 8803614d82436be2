"""Copies of the parameters that optimizers keep, such as master weights: each lane has its own."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from models import KINDS, assert_same_state, backward, minibatches, mlp, run, squares, two
from torch.optim import SGD

from lossguard.torch import BestOf, Recommended


class Master(SGD):
    """SGD on weights of its own, in float32, which it copies into the parameters."""

    def step(self, closure=None):
        self.known = [(p, p.detach()) for p in self.param_groups[0]["params"]]  # no copies
        for p in self.param_groups[0]["params"]:
            master = self.state[p].setdefault("master", p.detach().float().clone())
            master.sub_(p.grad.float(), alpha=self.param_groups[0]["lr"])
            p.copy_(master)


class Eager(Master):
    """The same, which copies the parameters when it is built."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for p in self.param_groups[0]["params"]:
            self.state[p]["master"] = p.detach().float().clone()


def test_they_are_saved():
    """In a cycle that the learned optimizer leads: later the fallback goes on from there."""
    ends, saved = [], {}
    for resumed in (False, True):
        w = torch.nn.Parameter(torch.tensor([4.0, -1.0]))
        learned, fallback = SGD([w], lr=0.1), Master([w], lr=0.01)
        guard, k = Recommended(learned, fallback, model=None), 0
        if resumed:
            guard.load_state_dict(saved)
            k = 25
        for step in range(k, 200):
            if step == 25:
                saved = saved or deepcopy(guard.state_dict())
            learned.param_groups[0]["lr"] = 0.1 if step < 40 else -0.05
            guard.step(squares(w))
        ends.append(w.detach())
        winners = [decision.winner for decision in guard.history]
    assert torch.equal(*ends) and {0, 1} <= {*winners}


def test_momentum_is_no_copy_where_gradients_are_the_parameters():
    """As those of half their squared norm."""
    w = torch.nn.Parameter(torch.arange(1.0, 6.0))
    guard = BestOf([SGD([w], 0.02, momentum=0.9), SGD([w], 0.01)], model=None)
    for _ in range(40):
        guard.step(lambda: backward(w.square().sum() / 2))
    assert not any(lane.memory.copies_at(lane.point) for lane in guard._lanes.values())


IN_MASTERS = "in an optimizer's state, which goes where they go, got Elsewhere with some in masters"
FORGETS = (BestOf, (0.05, 0.3))
"""The second one is ruined, and begins again."""


@pytest.mark.parametrize(("kind", "rates"), [*((kind, (0.7, 0.2)) for kind in KINDS), FORGETS])
def test_master_weights_go_with_their_lane(kind, rates):
    """Else the next step would undo what the guard has copied into the parameters."""
    ends = []
    pairs = ((SGD, SGD), (Master, SGD), (SGD, Master), (Eager, SGD), (SGD, Eager))
    for learned, fallback in pairs:
        torch.manual_seed(0)
        model = mlp()
        makers = (partial(made, lr=lr) for made, lr in zip((learned, fallback), rates, strict=True))
        guard = two(kind, model, *makers, nt=2)
        run(guard, model, minibatches(200 if rates == FORGETS[1] else 60))
        ends.append((model.state_dict(), repr(guard.history)))
    for end in ends[1:]:
        assert_same_state(end, ends[0])


class Elsewhere(SGD):
    """Master weights that are not in its state, beside copies that stay where they began."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, lr=lr)
        self.anchors = [p.detach().clone() for p in params]
        self.masters = [[p.detach().double() for p in params]]

    def step(self, closure=None):
        if not self.masters:
            return super().step(closure)
        with torch.no_grad():
            for p, master in zip(self.param_groups[0]["params"], *self.masters, strict=True):
                master.sub_(p.grad, alpha=self.param_groups[0]["lr"])
                p.copy_(master)
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_master_weights_of_narrow_parameters_go_with_their_lane(kind):
    model = mlp().bfloat16()
    guard = two(kind, model, lambda ps: Master(ps, lr=0.1), nt=2)
    run(guard, model, [(x.bfloat16(), labels) for x, labels in minibatches(3)])
    for lane in guard._lanes.values():
        found = lane.memory.copies_at(lane.point)
        assert found == ({"master"} if isinstance(lane.optimizer, Master) else set())
