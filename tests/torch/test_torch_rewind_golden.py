"""``Rewind`` takes the decisions of the rule in plain Python, to the last bit."""

from operator import attrgetter

import numpy as np
import pytest
import torch
from numpy_rewind import KINDS, OPTIONS, Run, losses_of
from rewinding import drive, one_weight

from lossguard.torch import Rewind

known = attrgetter("returns", "thrown", "skipped", "scale")


@pytest.mark.parametrize("which", range(len(OPTIONS)))
def test_it_decides_as_the_reference_does(which):
    events = np.zeros(4, int)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        kinds = [kind for kind in KINDS if kind != "infinite"]  # it takes such steps
        losses, gradients = losses_of(rng.choice(kinds, rng.integers(3, 12)), seed)
        gradients = gradients[:, 0]

        def advance(x, i, scale, losses=losses, gradients=gradients):
            sound = bool(np.isfinite([losses[i], gradients[i]]).all())
            return losses[i], x - scale * gradients[i], sound, sound

        run = Run(0.0, advance, late=True, **OPTIONS[which])
        model, optimizer = one_weight()
        rewind = Rewind(model, optimizer, every=1, **OPTIONS[which])
        for i, (loss, gradient) in enumerate(zip(losses, gradients, strict=True)):
            drive(rewind, model, optimizer, [torch.tensor(loss)], gradient)
            run.step(i)
            assert known(rewind) == known(run.rule), (seed, i)
            assert model.weight.item() == run.points[-1], (seed, i)
        assert rewind._trusted["model"]["weight"].item() == run.points[run.rule.trusted]
        kinds = [event.kind for event in rewind.events]
        told = kinds.count("return"), kinds.count("unanswered")
        events += *told, rewind.skipped, run.rule.idle
    assert (events > 0).all(), events
