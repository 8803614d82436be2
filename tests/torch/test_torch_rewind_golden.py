"""``Rewind`` takes the decisions of the rule in plain Python, to the last bit."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from lossguard.torch import Rewind

FILE = Path(__file__).parents[1] / "guards" / "numpy_rewind.py"
spec = importlib.util.spec_from_file_location("numpy_rewind", FILE)
assert spec and spec.loader
numpy_rewind = importlib.util.module_from_spec(spec)
spec.loader.exec_module(numpy_rewind)

LENGTH = 700
KINDS = ("flat", "falls", "rises", "spikes", "broken", "lower")
OPTIONS = (
    {"window": 64, "rise": 1 / 16},
    {"window": 128, "rho": 0.5, "factor": 0.25, "rise": 0.125},
    {"window": 64, "rho": 0.0, "rise": 0.0},
)


def losses_of(seed):
    """Losses that fall, spike, break and rise in an order of the seed's; NaN where broken."""
    rng = np.random.default_rng(seed)
    levels, level = np.empty(LENGTH), 16.0
    parts = np.array_split(np.arange(LENGTH), rng.integers(3, 12))
    for rows in parts:
        kind = rng.choice(KINDS)
        count = np.arange(len(rows))
        slope = {"falls": -1 / 32, "rises": 1 / 16}.get(kind, 0.0)
        up = {"lower": -2.0, "spikes": 8.0}.get(kind, 0.0)
        levels[rows] = level + up + slope * count
        if kind == "broken":
            levels[rows[count % 4 > 0]] = np.nan
        level += min(up, 0.0) + slope * len(rows)
    return levels + rng.integers(0, 64, LENGTH) / 64


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
        losses = losses_of(seed)
        rng = np.random.default_rng(seed)
        gradients = np.where(np.isnan(losses), np.nan, rng.integers(-8, 9, LENGTH) / 8)

        def advance(x, i, scale, losses=losses, gradients=gradients):
            return losses[i], x - scale * gradients[i], bool(np.isfinite(losses[i]))

        run = numpy_rewind.Run(1.0, advance, late=True, **OPTIONS[which])
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
