"""A guard's state on another device than where it was saved.

The device is "meta", which has shapes and no numbers: where tensors go shows, not what becomes of a
run that goes on there.
"""

import pytest
import torch
from models import mlp, run, spiral
from torch import Tensor, nn
from torch.optim import Adam

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
