"""Optimizers of other packages, as they are, on either side."""

import copy

import pytest
import torch
from algorithm2 import algorithm2, assert_same_run
from models import assert_resumes, loss_fn, mlp, run, spiral, squares
from torch import nn
from torch.optim import SGD

from lossguard.torch import LossGuard

NT, NC, CYCLES = 3, 2, 5


def still(params):
    """An optimizer that never moves."""
    return SGD(params, lr=0.0)


def schedule_free(name):
    package = pytest.importorskip("schedulefree")
    lr = 0.2 if name.startswith("SGD") else 0.01
    return lambda params: getattr(package, name)(params, lr=lr)


SCHEDULE_FREE = ["SGDScheduleFree", "AdamWScheduleFree"]


@pytest.mark.parametrize("name", SCHEDULE_FREE)
@pytest.mark.parametrize("side", ["learned", "fallback"])
@pytest.mark.parametrize("loser", ["keep", "rollback", "reset"])
@pytest.mark.parametrize("hedge", [False, True, "only"])
def test_schedule_free_alone_is_schedule_free_guarded(name, side, loser, hedge):
    """If it wins every cycle: x is its averaged iterate, at which it is checked."""
    make = schedule_free(name)
    model = mlp()
    alone = copy.deepcopy(model)
    optimizer = make(alone.parameters())
    makers = (make, still) if side == "learned" else (still, make)
    learned, fallback = (one(model.parameters()) for one in makers)
    guard = LossGuard(learned, fallback, nt=NT, nc=NC, loser=loser, hedge=hedge)
    batches = [spiral(16)] * (NT + NC)  # the same one, on which every cycle is progress
    for _ in range(CYCLES):
        run(guard, model, batches)
        optimizer.train()
        for batch in batches[:NT]:
            optimizer.zero_grad()
            loss_fn(alone, batch).backward()
            optimizer.step()
        optimizer.eval()
        decision = guard.last_decision
        assert (decision.winner == 0) == (side == "learned")
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        checked = decision.learned_loss if side == "learned" else decision.fallback_loss
        assert checked == pytest.approx(loss_fn(alone, batches[0]).item(), rel=1e-5)


@pytest.mark.parametrize("done", [6, 7, 9])
def test_schedule_free_resumes_bit_by_bit(done):
    make = schedule_free("AdamWScheduleFree")

    def build(model):
        learned, fallback = make(model.parameters()), make(model.parameters())
        learned.param_groups[0]["lr"] = 0.05
        return LossGuard(learned, fallback, nt=NT, nc=NC, hedge=True, loser="reset")

    history = assert_resumes(build, mlp(), [spiral(16) for _ in range(30)], done)
    assert 0 in {decision.winner for decision in history}


FROM_PYTORCH_OPTIMIZER = {
    "Lion": {"lr": 0.01},
    "Adan": {"lr": 0.05},
    "AdaBelief": {"lr": 0.05},
    "Prodigy": {},
    "SOAP": {"lr": 0.05},
    "Shampoo": {"lr": 0.1},
}


@pytest.mark.parametrize("name", FROM_PYTORCH_OPTIMIZER)
@pytest.mark.parametrize("side", ["learned", "fallback"])
@pytest.mark.parametrize("loser", ["keep", "reset"])
def test_pytorch_optimizer(name, side, loser):
    package = pytest.importorskip("pytorch_optimizer")

    def tested(params):
        return getattr(package, name)(list(params), **FROM_PYTORCH_OPTIMIZER[name])

    makers = (tested, still) if side == "learned" else (still, tested)
    model = nn.Sequential(nn.Linear(2, 16, bias=False), nn.Tanh(), nn.Linear(16, 2, bias=False))
    batches = [spiral(16)] * (CYCLES * (NT + NC))
    expected = list(
        algorithm2(model, *makers, batches, loss_fn, nt=NT, nc=NC, loser=loser, hedge=True)
    )
    learned, fallback = (make(model.parameters()) for make in makers)
    guard = LossGuard(learned, fallback, nt=NT, nc=NC, loser=loser, hedge=True)
    run(guard, model, batches)
    assert_same_run(guard, model, expected)
    assert (0 if side == "learned" else 2) in {decision.winner for decision in guard.history}


@pytest.mark.parametrize(
    ("loser", "expected"), [("reset", {}), ("rollback", {}), ("keep", {"t": 4})]
)
def test_a_group_entry_that_the_first_step_makes_is_memory(loser, expected):
    """As nearly all of pytorch_optimizer's keep their count of steps."""

    class Counting(SGD):
        def step(self, closure=None):
            group = self.param_groups[0]
            group["t"] = group.get("t", 0) + 1
            return super().step(closure)

    w = torch.ones(1, requires_grad=True)
    learned = Counting([w], lr=0.1, maximize=True)  # loses
    guard = LossGuard(learned, SGD([w], lr=0.1), nt=2, nc=1, loser=loser)
    for _ in range(2):
        guard.cycle(lambda batch: w.square().sum(), [1, 2], [3])
    kept = {key: value for key, value in learned.param_groups[0].items() if key == "t"}
    assert kept == expected


def test_schedule_free_after_an_error_in_the_closure():
    """It is in no training mode then, or its next cycle would train from the averaged iterate."""
    make = schedule_free("SGDScheduleFree")
    weights = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = mlp()
        guard = LossGuard(still(model.parameters()), make(model.parameters()), nt=2, nc=1)
        batches = [spiral(16)] * 3
        run(guard, model, batches)
        if fails:
            with pytest.raises(KeyError):
                guard.step(lambda: {}["loss"])
        assert not guard.fallback.param_groups[0]["train_mode"]
        run(guard, model, batches)
        weights.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*weights, strict=True):
        torch.testing.assert_close(p, q)


def test_entries_of_a_group_that_was_added_begin_anew():
    """Schedule-free counts its steps in each group's entries."""
    package = pytest.importorskip("schedulefree")
    w, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    learned = package.SGDScheduleFree([w], lr=1e3)
    guard = LossGuard(learned, SGD([w], lr=0.1), nt=2, nc=1, loser="reset")
    guard.add_param_group({"params": [v]})
    closure = squares(w, v)
    for _ in range(3):
        guard.step(closure)
    assert guard.last_decision.winner == 1
    assert [group["k"] for group in learned.param_groups] == [0, 0]
