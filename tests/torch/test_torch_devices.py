"""A guard's state on another device than where it was saved, and what it gets on another.

The device is "meta", or a fake one, which have shapes and no numbers: where tensors go shows, not
what becomes of a run that goes on there.
"""

import pytest
import torch
from models import mlp, run, spiral
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adam

from lossguard.torch import BestOf, LossGuard, ResidualGuard, ratchet

OPTIONS = {
    BestOf: {"patience": 1},
    LossGuard: {"nc": 1, "hedge": True, "loser": "rollback", "ratchet": ratchet(cycles=1)},
    ResidualGuard: {},
}


def guarded(kind, device):
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(16)).to(device)
    both = (Adam(model.parameters(), lr=lr) for lr in (0.1, 0.01))
    return model, kind(*both, model=model, nt=3, **OPTIONS[kind])


def tensors(value, path=()):
    """Those in nested containers, by where they are."""
    if isinstance(value, Tensor):
        return {path: value}
    items = enumerate(value) if isinstance(value, (list, tuple)) else ()
    items = value.items() if isinstance(value, dict) else items
    return {place: tensor for k, v in items for place, tensor in tensors(v, (*path, k)).items()}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("minibatches", [8, 9])
def test_what_is_of_the_models_shapes_goes_to_the_models_device(kind, minibatches):
    """Single numbers needn't: Adam has its counter on the CPU."""
    model, guard = guarded(kind, "cpu")
    run(guard, model, [spiral() for _ in range(minibatches)])
    saved = guard.state_dict()
    model, guard = guarded(kind, "meta")
    guard.load_state_dict(saved)
    there, here = tensors(guard.state_dict()), tensors(saved)
    assert there.keys() == here.keys()
    for place, tensor in there.items():
        assert tensor.shape == here[place].shape
        if tensor.ndim and "random" not in place:
            assert tensor.device.type == "meta", place
    assert all(own.device.type == "meta" for own in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_new_groups_device_has_its_generator_set_too(kind):
    w = torch.ones(1, requires_grad=True)
    guard = kind(SGD([w], lr=0.1), SGD([w], lr=0.2))
    with FakeTensorMode():
        new = nn.Parameter(torch.empty(1, device="cuda"))
    guard.add_param_group({"params": [new]})
    randomness = guard._randomness if kind is ResidualGuard else guard._cycle.randomness
    assert randomness.devices == [new.device]
