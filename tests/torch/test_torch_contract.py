"""The guards keep the contract of ``torch.optim.Optimizer``."""

import gc
import weakref
from copy import deepcopy

import pytest
import torch
from models import (
    KINDS,
    assert_is_algorithm2,
    assert_same_state,
    backward,
    closure_for,
    loss_fn,
    minibatches,
    mlp,
    quadratic,
    refuses,
    run,
    spiral,
    step_by,
    twins,
    two,
)
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from lossguard.torch import BestOf, LossGuard, Recommended

KINDS_OF_TORCH = [one for one in vars(torch.optim).values() if isinstance(one, type)]
REFUSED, SPARSE = {"LBFGS"}, {"SparseAdam"}


def variants():
    names = {kind.__name__ for kind in KINDS_OF_TORCH if issubclass(kind, Optimizer)}
    for name in sorted(names - {"Optimizer"} - REFUSED - SPARSE):
        yield pytest.param(name, {}, id=name)
    for name in ("SGD", "Adam", "AdamW", "Adagrad"):
        yield pytest.param(name, {"foreach": True}, id=f"{name}-foreach")
        yield pytest.param(name, {"fused": True}, id=f"{name}-fused")
    yield pytest.param("AdamW", {"lr": torch.tensor(1e-3)}, id="AdamW-tensor-rate")


def matrices():
    """A model whose parameters are all matrices, which is all that Muon takes."""
    return nn.Sequential(nn.Linear(2, 16, bias=False), nn.Tanh(), nn.Linear(16, 2, bias=False))


@pytest.mark.parametrize(("name", "options"), list(variants()))
@pytest.mark.parametrize(("side", "loser"), [("learned", "reset"), ("fallback", "keep")])
def test_every_optimizer_on_either_side(name, options, side, loser):
    def tested(params):
        return getattr(torch.optim, name)(params, **options)

    makers = (tested, lambda ps: SGD(ps, lr=0.05))
    model = matrices() if name == "Muon" else mlp()
    batches = [spiral() for _ in range(25)]
    assert_is_algorithm2(
        model, *makers[:: 1 if side == "learned" else -1], batches, nt=3, nc=2, loser=loser
    )


def test_sparse_gradients():
    embedding = nn.Embedding(8, 2, sparse=True)

    def loss(k=0):
        return embedding(torch.tensor([1, 2])).square().sum()

    guard = two(
        LossGuard, embedding, lambda ps: torch.optim.SparseAdam(ps, lr=0.1),
        lambda ps: SGD(ps, lr=0.1), nt=3, check=loss,
    )  # fmt: skip
    for _ in range(6):
        guard.step(lambda: backward(loss()))
    assert {d.winner for d in guard.history} == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_called(kind):
    model, calls = mlp(), []
    guard = two(kind, model, nt=2)
    guard.register_step_pre_hook(lambda *_: calls.append("before step"))
    guard.register_step_post_hook(lambda *_: calls.append("after step"))
    guard.register_state_dict_pre_hook(lambda *_: calls.append("before save"))
    guard.register_state_dict_post_hook(lambda _, saved: calls.append(sorted(saved)))
    guard.step(closure_for(guard, model, spiral()))
    guard.state_dict()
    assert calls == ["before step", "after step", "before save", ["param_groups", "state"]]


def test_a_callback_is_called_in_loops_too_and_hooks_are_not():
    weight, closure = quadratic()
    calls = []
    sgd, tells = SGD([weight], lr=0.1), lambda _: calls.append("told")
    guard = BestOf([sgd], model=None, nt=2, callback=tells)
    guard.register_step_pre_hook(lambda *_: calls.append("before"))
    guard.register_step_post_hook(lambda *_: calls.append("after"))
    for lane in guard.lanes():
        lane.step(closure())
    for lane in guard.lanes():
        lane.step(closure())
        break  # after its last step: it counts
    for _ in guard.lanes():
        break
    assert calls == ["told"] and len(guard.history) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_garbage_collector(kind):
    """Published training scripts switch it off; what is left for it are copies of a model."""
    model = mlp()
    guard = two(kind, model, nt=3)
    run(guard, model, minibatches(6))
    gc.collect()
    gc.freeze()  # what is there already is not looked through again
    gc.disable()
    try:
        run(guard, model, minibatches(12))
        assert gc.collect() == 0
        (lane, *_) = (lane for lane in guard._lanes.values() if not lane.live)
        state, seen = guard.state_dict(), [weakref.ref(lane.values[0])]
        seen += [weakref.ref(t) for entries in state["state"].values() for t in entries.values()]
        guard.load_state_dict(state)
        del state
        assert len(seen) > 8 and not any(ref() is not None for ref in seen)
    finally:
        gc.enable()
        gc.unfreeze()


def test_the_guard_goes_with_its_last_reference_or_the_collector():
    model = mlp()
    guard = two(Recommended, model)
    seen = weakref.ref(guard)
    del guard
    gc.collect()
    assert seen() is None


def test_accumulation_and_clipping_in_a_body():
    model, twin = twins()
    guard = two(Recommended, model, fallback=lambda ps: SGD(ps, lr=0.5), nt=10)
    alone = SGD(twin.parameters(), lr=0.5)
    guard.share = 0.0
    for x, labels in minibatches(30):
        halves = [(x[:8], labels[:8]), (x[8:], labels[8:])]
        for lane in guard.lanes():
            total = 0.0
            for half in halves:
                loss = loss_fn(model, half) / 2
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            lane.step(total)
        alone.zero_grad()
        for half in halves:
            (loss_fn(twin, half) / 2).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        alone.step()
    assert [decision.gradients for decision in guard.history] == [20, 10, 10]  # a trial of 10 steps
    assert {decision.winner for decision in guard.history} == {2}
    assert_same_state(model.state_dict(), twin.state_dict())


def test_optimizers_with_other_conventions_of_step():
    """``step()`` as public Muons have, and ``step(loss)`` as learned optimizers have."""

    class Plain(SGD):
        def step(self):
            super().step()

    class Polyak(SGD):
        def step(self, closure=None, *, loss):
            assert closure is None
            square = sum(p.grad.square().sum() for p in self.param_groups[0]["params"])
            self.param_groups[0]["lr"] = (loss / square).item()
            super().step()

    weight, closure = quadratic(3.0)
    guard = BestOf([Plain([weight], lr=0.1), Polyak([weight], lr=1.0)], model=None, nt=1)
    guard.step(closure)
    guard.step(closure)
    assert guard.last_decision.winner == 1 and weight.item() == pytest.approx(3 / 4)
    for lane in guard.lanes():
        lane.step(closure())
    assert weight.item() == pytest.approx(3 / 8)


def test_an_optimizer_that_needs_a_closure_is_refused():
    """It may evaluate again, with gradients that a loop's body would have clipped."""

    class Twice(SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    weight, _ = quadratic(3.0)
    for kind in (Twice, LBFGS):
        told = rf"^optimizers\[0\] must have step\(\), .* {kind.__name__} with step\(closure"
        with pytest.raises(ValueError, match=told):
            BestOf([kind([weight])], model=None)


def test_a_running_job_can_be_put_under_a_guard():
    """What its optimizer remembers goes on, at its rate; the others' change in proportion."""
    model, batches = mlp(), minibatches(40)
    old = AdamW(model.parameters(), lr=0.01, eps=1e-6)
    for batch in batches[:5]:
        step_by(old, loss_fn(model, batch))
    old.zero_grad()
    old.param_groups[0] |= {"lr": 0.005, "initial_lr": 0.01}
    alone = deepcopy(model)
    twin = AdamW(alone.parameters())
    twin.load_state_dict(deepcopy(old.state_dict()))
    with refuses("fallback must be new when the guard is built, got AdamW that has stepped"):
        Recommended(SGD(model.parameters(), lr=2e-9), old, model=model)
    learned, new = SGD(model.parameters(), lr=2e-9), AdamW(model.parameters(), lr=0.01)
    guard = Recommended(learned, new, model=model)
    guard.load_state_dict(old.state_dict())
    (group,) = guard.param_groups
    assert (group["lr"], group["initial_lr"], group["eps"]) == (0.005, 0.01, 1e-6)
    assert learned.param_groups[0]["lr"] == 1e-9
    for batch in batches[5:]:
        run(guard, model, [batch])
        step_by(twin, loss_fn(alone, batch))
    assert guard.last_decision.winner == 2
    assert_same_state(model.state_dict(), alone.state_dict())
    with pytest.raises(ValueError, match=r"^state_dict must be of a guard .* before the first st"):
        guard.load_state_dict(old.state_dict())
    guard._lanes["z"].forget()
    assert not guard._lanes["z"].memory.now.state


@pytest.mark.parametrize("job", [float, torch.tensor])
@pytest.mark.parametrize("ours", [float, torch.tensor])
def test_a_job_is_taken_over_at_its_rate(job, ours):
    """Whatever kind of number the rates are; the guard's own tensor stays the rate."""
    weight, closure = quadratic()
    given, learned = ours(0.01), SGD([weight], lr=1.0)
    guard = Recommended(learned, fallback := SGD([weight], lr=given), model=None)
    guard.load_state_dict(SGD([weight], lr=job(0.005)).state_dict())
    guard.step(closure)
    rates = [one.param_groups[0]["lr"] for one in (guard, fallback, learned)]
    assert [float(rate) for rate in rates] == pytest.approx([0.005, 0.005, 0.5])
    assert rates[1] is given or ours is float


def test_a_job_that_cannot_be_taken_over_is_refused():
    """It is of another class, maximizes, has lost its state, or has rates out of proportion."""
    model = mlp()
    first, *others = model.parameters()
    fallback = AdamW([{"params": [first]}, {"params": others}], lr=0.1)
    guard = Recommended(SGD(model.parameters(), lr=1.0), fallback, model=model)
    before = guard.state_dict()
    groups = [{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.3}]
    for made, changed, told in (
        (SGD, {}, "of an AdamW, which goes on with it, or of a Recommended, got one without"),
        (AdamW, {"maximize": True}, "of a run that minimizes, got maximize=True"),
    ):
        job = made([dict(group) for group in groups])
        job.param_groups[1].update(changed)
        with refuses(f"state_dict must be {told}"):
            guard.load_state_dict(job.state_dict())
        assert_same_state(guard.state_dict(), before)
    flat = AdamW(groups).state_dict()
    flat["state"] = {key: {} for key in range(4)}  # as PyTorch flattens and unflattens it
    with refuses("state_dict must hold what is known of each parameter, got nothing of any (get "):
        guard.load_state_dict(flat)
    assert_same_state(guard.state_dict(), before)
    with refuses("rates of the guard's groups must change in proportion"):
        guard.load_state_dict(AdamW(groups).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_may_make_its_memory_when_it_is_built(kind):
    """A guard that has it begin again sets it to that."""

    class Ready(SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            for p in self.param_groups[0]["params"]:
                self.state[p]["m"] = torch.zeros_like(p)

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                self.state[p]["m"].mul_(0.5).add_(p.grad)
                p.sub_(0.1 * self.state[p]["m"])

    model = mlp()
    options = {LossGuard: {"loser": "reset"}}.get(kind, {})
    guard = two(kind, model, Ready, Ready, nt=2, **options)
    run(guard, model, minibatches(20))
    (lane, *_) = guard._lanes.values()
    lane.forget()
    assert all(not state["m"].any() for state in lane.memory.now.state.values())
    run(guard, model, minibatches(3))
