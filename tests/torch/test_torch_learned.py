"""What the learned optimizers share: copies, checkpoints, memory in float32, what is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch
from models import refuses, squares
from test_torch_lstm import Reference
from test_torch_mlp import weights_of
from torch import nn
from torch.optim.lr_scheduler import StepLR

import lossguard
from lossguard.torch import LSTMOptimizer, MLPOptimizer, Recommended


@pytest.fixture(params=[LSTMOptimizer, MLPOptimizer])
def make(request):
    """An optimizer of a parameter, of one architecture; each time with the same weights."""
    kind = request.param
    weights = Reference().state_dict() if kind is LSTMOptimizer else weights_of()
    return lambda p: kind([p], weights)


def test_a_closure_is_evaluated_with_gradients(make):
    p, q = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    alone, by_hand = make(p), make(q)
    q.square().sum().backward()
    by_hand.step()

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert alone.step(closure).item() == 6 and torch.equal(p, q)


def test_copies_and_checkpoints_go_on_alike(make):
    p = nn.Parameter(torch.randn(6, 3))
    optimizer = make(p)
    StepLR(optimizer, 100)  # replaces the optimizer's step

    def run(optimizer, steps):
        (p,) = optimizer.param_groups[0]["params"]
        for _ in range(steps):
            p.grad = p.detach().clone()
            optimizer.step()
        return p.detach()

    run(optimizer, 3)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    twins.append(make(nn.Parameter(p.detach().clone())))
    twins[-1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = run(optimizer, 3)
    for twin in twins:
        assert torch.equal(run(twin, 3), expected)


def test_schedulers_act_on_the_step(make):
    """Both are where the other one is before each step, as they see where they are."""
    plain, scheduled = (nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in range(2))
    optimizers = make(plain), make(scheduled)
    scheduler = StepLR(optimizers[1], 1, gamma=0.5)
    for k in range(3):
        scheduled.data.copy_(before := plain.detach().clone())
        for p, optimizer in zip((plain, scheduled), optimizers, strict=True):
            p.grad = torch.ones_like(p)
            optimizer.step()
        scheduler.step()
        step = plain.detach() - before
        assert step.all()
        torch.testing.assert_close(scheduled.detach() - before, step / 2**k)


def test_states_go_through_distributed_checkpoints_and_hooks(make):
    from torch.distributed.checkpoint import state_dict as dcp

    model = nn.Linear(3, 3)
    twin = copy.deepcopy(model)

    def optimizer_of(model):
        kind = make(model.weight)
        kind.add_param_group({"params": [model.bias]})
        return kind

    optimizer, other = optimizer_of(model), optimizer_of(twin)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    twin.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(twin, other, saved)
    seen = []
    other.register_load_state_dict_pre_hook(lambda _, given: seen.append(given) or {**given})
    other.load_state_dict(copy.deepcopy(other.state_dict()))
    assert seen
    for one, of in ((model, optimizer), (twin, other)):
        for _ in range(2):
            of.zero_grad()
            one(torch.ones(2, 3)).square().sum().backward()
            of.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_states_of_others_are_refused(make):
    p = nn.Parameter(torch.ones(3))
    optimizer, others = make(p), [torch.optim.Adam([p]), make(nn.Parameter(torch.ones(4)))]
    for other in others:
        (q,) = other.param_groups[0]["params"]
        q.grad = torch.ones_like(q)
        other.step()
    fresh = copy.deepcopy(optimizer.state_dict())
    for other in [*others, torch.optim.SGD([p])]:
        with pytest.raises(ValueError, match=f"^state must be one of {type(optimizer).__name__}"):
            optimizer.load_state_dict(other.state_dict())
        assert optimizer.state_dict() == fresh


def test_states_of_a_guard_with_other_weights_are_refused(make):
    def guard_of(learned, p):
        guard = Recommended(learned, torch.optim.SGD([p], 0.1), model=None)
        guard.step(squares(p))
        return guard

    p = nn.Parameter(torch.ones(3))
    saved = guard_of(make(p), p).state_dict()
    for entries in saved["state"].values():
        for key in [key for key in entries if key.endswith((".memory.c", ".memory.units"))]:
            del entries[key]
    with pytest.raises(ValueError, match=f"^state must be one of {type(make(p)).__name__}"):
        guard_of(make(p), p).load_state_dict(saved)


def test_numbers_are_checked_and_plain(make):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = make(p)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^(lr|scale) must be positive and finite"):
            optimizer.add_param_group({"params": [q], "lr": wrong})
    weights = {name: tensor.numpy() for name, tensor in optimizer.weights.items()}
    rate = {LSTMOptimizer: "scale", MLPOptimizer: "lr"}[type(optimizer)]
    made = type(optimizer)([q], weights, **{rate: np.float32(0.5)})
    assert type(made.param_groups[0]["lr"]) is float
    with refuses("weights must be a Mapping such as a dictionary of tens"):
        type(optimizer)([q], lossguard.load_weights(lossguard.pretrained_path("mlp-small")).weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_memory_is_in_float32_and_stays_so(make, dtype):
    p = nn.Parameter(torch.randn(6, 2, dtype=dtype))
    optimizer = make(p)
    p.grad = p.detach().clone()
    optimizer.step()
    q = nn.Parameter(p.detach().clone())
    twin = make(q)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p.grad = q.grad = p.detach().clone()
    optimizer.step()
    twin.step()
    assert p.dtype == dtype and torch.equal(p, q)
    assert twin.state[q].keys() == optimizer.state[p].keys() and twin.state[q]
    for name, tensor in twin.state[q].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, optimizer.state[p][name])


def test_autocast_around_the_step_changes_nothing(make):
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    for p, enabled in zip(params, (False, True), strict=True):
        optimizer = make(p)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(2):
                p.grad = p.detach().clone()
                optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_other_gradients_are_refused(make, kind):
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64 if kind == "complex" else None))
    weight.grad = weight.detach().to_sparse() if kind == "sparse" else weight.detach()
    optimizer, other = make(weight), nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [other]})
    optimizer.param_groups.reverse()
    other.grad = torch.ones(2)
    name = type(optimizer).__name__
    with refuses(f"gradients must be real and dense for {name}, got a {kind} one", "$"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2)) and not optimizer.state
