"""Where the default type is float64, what is float32 stays so."""

import pytest
import torch
from models import KINDS, closure_for, loss_fn, minibatches, mlp, step_by, two

from lossguard.torch import LSTMOptimizer, MLPOptimizer, Rewind


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, Rewind])
@pytest.mark.parametrize(
    ("learned", "weights"), [(MLPOptimizer, "mlp-small"), (LSTMOptimizer, "lstm-mnist-mlp")]
)
def test_guards_and_learned_optimizers_run(kind, learned, weights, narrow):
    model = mlp().float() if narrow else mlp()
    dtype = torch.float32 if narrow else torch.float64

    def make(params):
        return learned.pretrained(params, weights)

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
