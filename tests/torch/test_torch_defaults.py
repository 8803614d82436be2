"""Where tensors are elsewhere or of another type by default, those of guards are as they belong."""

import copy

import pytest
import torch
from models import KINDS, closure_for, loss_fn, minibatches, mlp, step_by, two
from torch.optim import SGD

from lossguard.torch import MLPOptimizer, Rewind


@pytest.fixture
def elsewhere():
    yield
    torch.set_default_device(None)


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("kind", [*KINDS, Rewind])
def test_guards_run_and_resume_elsewhere(kind):
    model, batches = mlp(), minibatches(24)
    optimizer = SGD(model.parameters(), lr=torch.tensor(0.1))
    rewind = Rewind(model, optimizer, every=4) if kind is Rewind else None
    guard = None if rewind else two(kind, model, lambda ps: SGD(ps, lr=0.2), nt=4)
    torch.set_default_device("meta")  # what is made there has no numbers
    for k, batch in enumerate(batches):
        if guard:
            guard.step(closure_for(guard, model, batch))
            guard.load_state_dict(copy.deepcopy(guard.state_dict()))
        else:
            loss = step_by(optimizer, loss_fn(model, batch))
            rewind.observe(loss.item() if k % 2 else loss)
            rewind.load_state_dict(rewind.state_dict())
    if rewind:
        model[0].weight.data.fill_(torch.nan)
        for _ in range(4):
            rewind.observe(1.0)
        assert rewind.returns == 1
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.usefixtures("elsewhere")
def test_learned_optimizers_run_elsewhere():
    model, batches = mlp(), minibatches(3)
    torch.set_default_device("meta")
    optimizer = MLPOptimizer.pretrained(model.parameters(), "mlp-small")
    for batch in batches:
        step_by(optimizer, loss_fn(model, batch))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, Rewind])
def test_guards_and_learned_optimizers_keep_their_type(kind, narrow):
    model = mlp().float() if narrow else mlp()
    dtype = torch.float32 if narrow else torch.float64

    def make(params):
        return MLPOptimizer.pretrained(params, "mlp-small")

    optimizer = make(model.parameters())
    rewind = Rewind(model, optimizer) if kind is Rewind else None
    guard = None if rewind else two(kind, model, make, nt=4)
    for x, labels in minibatches(12):
        batch = x.to(dtype), labels
        if guard:
            guard.step(closure_for(guard, model, batch))
        else:
            rewind.observe(step_by(optimizer, loss_fn(model, batch)))
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
