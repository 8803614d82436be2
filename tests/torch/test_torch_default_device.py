"""Where tensors are made elsewhere by default, those of guards are made where they belong."""

import copy

import pytest
import torch
from models import KINDS, closure_for, loss_fn, minibatches, mlp, step_by, two
from torch.optim import SGD

from lossguard.torch import LSTMOptimizer, MLPOptimizer, Rewind


@pytest.fixture(autouse=True)
def _elsewhere():
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("kind", [*KINDS, Rewind])
def test_guards_run_and_resume(kind):
    model, batches = mlp(), minibatches(24)
    optimizer = SGD(model.parameters(), lr=torch.tensor(0.1))
    rewind = Rewind(model, optimizer, window=64, every=4) if kind is Rewind else None
    guard = None if rewind else two(kind, model, lambda ps: SGD(ps, lr=0.2), nt=4)
    torch.set_default_device("meta")  # what is made there has no numbers
    for k, batch in enumerate(batches):
        if guard:
            guard.step(closure_for(guard, model, batch))
            state = copy.deepcopy(guard.state_dict())
            guard.load_state_dict(state)
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


@pytest.mark.parametrize(
    ("learned", "weights"), [(MLPOptimizer, "mlp-small"), (LSTMOptimizer, "lstm-mnist-mlp")]
)
def test_learned_optimizers_run(learned, weights):
    model, batches = mlp(), minibatches(3)
    torch.set_default_device("meta")
    optimizer = learned.pretrained(model.parameters(), weights)
    for batch in batches:
        step_by(optimizer, loss_fn(model, batch))
    assert all(p.isfinite().all() for p in model.parameters())
