"""A chain of optimizers is each of them on its own parameters, alone and under guards."""

import copy
import io

import pytest
import torch
from models import assert_same_state, closure_for, mlp, quadratic, run, spiral
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

from lossguard.torch import BestOf, ChainedOptimizer, LossGuard, LossStep, ResidualGuard

NT, BATCHES = 2, 24


def parts(model, rate=0.05):
    """Two optimizers with state, one of matrices and one of the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    muon = getattr(torch.optim, "Muon", None)
    first = SGD(matrices, lr=rate, momentum=0.9) if muon is None else muon(matrices, lr=rate)
    return [first, Adam([{"params": [p]} for p in others], lr=rate)]


def chain(model, rate=0.05):
    return ChainedOptimizer(parts(model, rate))


def minibatches():
    torch.manual_seed(1)
    return [spiral() for _ in range(BATCHES)]


def model_and_alone():
    """A net, and what the parts alone make of another one, with its first loss of each step."""
    torch.manual_seed(0)
    net, other, losses = mlp(), mlp(), []
    other.load_state_dict(net.state_dict())
    both = parts(other)
    for batch in minibatches():
        loss = closure_for(both[1], other, batch)
        both[0].zero_grad()
        losses.append(loss())
        for one in both:
            one.step()
    return net, list(other.parameters()), losses


def detached(tensors):
    return [tensor.detach() for tensor in tensors]


def test_it_steps_each() -> None:
    model, alone, losses = model_and_alone()
    assert_same_state(detached(run(chain(model), model, minibatches())), detached(losses))
    assert_same_state(detached(model.parameters()), detached(alone))


@pytest.mark.parametrize("scaled", [False, True])
def test_best_of_has_it_as_a_lane_on_either_side(scaled) -> None:
    """A scale that is a power of two changes nothing."""
    model, alone, _ = model_and_alone()
    scaler = GradScaler("cpu", init_scale=1.0, enabled=scaled)
    guard = BestOf(chain(model, 1e-3), chain(model), nt=NT, scaler=scaler)
    for x, label in minibatches():

        def closure(x=x, label=label):
            loss = torch.nn.functional.cross_entropy(model(x), label)
            guard.scaler.scale(loss).backward()
            return loss

        guard.step(closure)
    copies = zip(map(id, guard._weights.params), guard._paths.all[1].copy, strict=True)
    assert_same_state(list(map(dict(copies).get, map(id, model.parameters()))), detached(alone))


@pytest.mark.parametrize("kind", [BestOf, LossGuard, ResidualGuard])
def test_a_guard_with_chains_goes_on_from_a_saved_state(kind) -> None:
    options = {"hedge": True, "nc": 1, "loser": "rollback"} if kind is LossGuard else {}
    ends, batches = [], minibatches()
    for resume in (False, True):
        torch.manual_seed(0)
        model = mlp()
        guard = kind(chain(model, 0.1), chain(model), nt=NT, **options)
        run(guard, model, batches[:11])
        if resume:
            buffer = io.BytesIO()
            torch.save(guard.state_dict(), buffer)
            buffer.seek(0)
            guard = kind(chain(model, 0.1), chain(model), nt=NT, **options)
            guard.load_state_dict(torch.load(buffer, weights_only=True))
        run(guard, model, batches[11:])
        ends.append((model.state_dict(), guard.state_dict()))
    assert_same_state(*ends)


def test_a_schedule_drives_all_of_them() -> None:
    w, closure = quadratic()
    b = torch.ones(1, requires_grad=True)
    pair = SGD([w], lr=0.1), SGD([b], lr=0.2)
    optimizer = ChainedOptimizer(pair)
    schedule = ExponentialLR(optimizer, 0.5)
    optimizer.step(closure)
    schedule.step()
    assert [one.param_groups[0]["lr"] for one in pair] == [0.05, 0.1]


def test_a_schedule_may_ask_what_all_of_them_have() -> None:
    """OneCycleLR drives the momentum too, if there is one."""
    w, _ = quadratic()
    b = torch.ones(1, requires_grad=True)
    optimizer = ChainedOptimizer([Adam([w], lr=0.1), Adam([b], lr=0.1, betas=(0.5, 0.9))])
    OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.95, 0.95]


def test_a_copy_works_on_its_own_parameters() -> None:
    torch.manual_seed(0)
    model = mlp()
    run(optimizer := chain(model), model, minibatches()[:2])
    net, twin = copy.deepcopy((model, optimizer))
    run(optimizer, model, minibatches()[2:])
    run(twin, net, minibatches()[2:])
    assert_same_state(net.state_dict(), model.state_dict())
    assert twin.optimizers[0].state is twin.state is not optimizer.state


def test_errors() -> None:
    w, _ = quadratic()
    one = SGD([w], lr=0.1)
    for several, got in (([], "0 with 0 parameters, 0"), ([one, one], "2 with 2 parameters, 1")):
        with pytest.raises(ValueError, match=f"at least one, each with .* its own, got {got} of"):
            ChainedOptimizer(several)
    schedulefree = pytest.importorskip("schedulefree")
    for part, name in (
        ("adam", "'adam'"),
        (ChainedOptimizer([one]), "ChainedOptimizer"),
        (LossStep(one), "LossStep"),
        (schedulefree.SGDScheduleFree([w], lr=0.1), "SGDScheduleFree"),
    ):
        with pytest.raises(ValueError, match=rf"^optimizers must be of torch.optim.* got {name}$"):
            ChainedOptimizer([part])
    with pytest.raises(ValueError, match="must be added to one of the optimizers, before"):
        ChainedOptimizer([one]).add_param_group({"params": [torch.ones(1)]})
