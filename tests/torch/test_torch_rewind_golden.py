"""``Rewind`` takes the decisions of the rule in plain Python, to the last bit."""

import numpy as np
import pytest
import torch
from numpy_rewind import KINDS, OPTIONS, Run, losses_of

from lossguard.torch import Rewind


def play(rewind, model, optimizer, losses, gradients):
    for loss, gradient in zip(losses, gradients, strict=True):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        rewind.observe(torch.tensor(loss))
        yield


@pytest.mark.parametrize("which", range(len(OPTIONS)))
def test_it_decides_as_the_reference_does(which):
    events = np.zeros(3, int)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        kinds = [kind for kind in KINDS if kind != "infinite"]  # it takes such steps
        losses, gradients = losses_of(rng.choice(kinds, rng.integers(3, 12)), seed)
        gradients = gradients[:, 0]
        losses[np.isnan(gradients)] = np.nan

        def advance(x, i, scale, losses=losses, gradients=gradients):
            return losses[i], x - scale * gradients[i], bool(np.isfinite(losses[i]))

        run = Run(1.0, advance, late=True, **OPTIONS[which])
        model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        torch.nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        rewind = Rewind(model, optimizer, every=1, **OPTIONS[which])
        for i, _ in enumerate(play(rewind, model, optimizer, losses, gradients)):
            run.step(i)
            rule = run.rule
            assert (rewind.returns, rewind.thrown, rewind.skipped, rewind.scale) == (
                rule.returns,
                rule.thrown,
                rule.skipped,
                rule.scale,
            ), (seed, i)
            assert model.weight.item() == run.points[-1], (seed, i)
        assert rewind._trusted["model"]["weight"].item() == run.points[rule.trusted]
        kinds = [event.kind for event in rewind.events]
        events += kinds.count("return"), kinds.count("unanswered"), rewind.skipped
    assert (events > 0).all(), events
