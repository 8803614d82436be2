"""Rates, of which ``Rewind`` has a step take a part: between steps they are the schedulers'."""

import math
from types import SimpleNamespace

import pytest
import torch
from rewinding import FALLS, HIGH, WINDOW, drive, one_weight, watched
from torch import nn
from torch.optim import lr_scheduler

from lossguard.torch import Rewind


@pytest.mark.parametrize("names", [("cosine", "plateau"), ("plateau", "cosine"), ("plateau",)])
def test_rates_go_back_whichever_scheduler_is_named_last(names):
    model, optimizer = one_weight()
    named = {
        "cosine": lr_scheduler.CosineAnnealingLR(optimizer, 1000),
        "plateau": lr_scheduler.ReduceLROnPlateau(optimizer, patience=50),
    }
    schedulers = [named[name] for name in names]
    rewind = Rewind(model, optimizer, schedulers=schedulers, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS[:60], after=named["cosine"].step)
    named["plateau"].step(1.0)  # from here on it thinks that the rate is what it is now
    drive(rewind, model, optimizer, FALLS[60:] + HIGH[:8], after=named["cosine"].step)
    expected = 0.5 * (1 + math.cos(math.pi * 112 / 1000))
    assert rewind.returns == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_momentum_that_a_scheduler_cycles_goes_back_with_it():
    model, optimizer = one_weight(torch.optim.Adam, betas=(0.9, 0.99))
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=1000)
    rewind, betas = Rewind(model, optimizer, schedulers=[scheduler], window=WINDOW, every=4), []

    def after():
        scheduler.step()
        betas.append(optimizer.param_groups[0]["betas"])

    drive(rewind, model, optimizer, FALLS + HIGH[:8], after=after)
    assert rewind.returns == 1 and betas[111] != betas[-1]
    assert optimizer.param_groups[0]["betas"] == betas[111]


def test_a_named_scheduler_goes_back_where_a_group_came_later():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.99)
    rewind = Rewind(model, optimizer, schedulers=[scheduler], window=WINDOW, every=4)
    drive(rewind, model[0], optimizer, FALLS[:120], after=scheduler.step)
    optimizer.add_param_group({"params": [model[1].weight], "lr": 0.3})
    drive(rewind, model[0], optimizer, FALLS[120:] + HIGH[:8])
    assert rewind.returns == 1 and scheduler.last_epoch == 112
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.99**112, 0.3])


def test_a_milestone_that_was_passed_and_undone_is_passed_once():
    model, optimizer = one_weight()
    scheduler = lr_scheduler.MultiStepLR(optimizer, [50, 120], 0.5)
    rewind = Rewind(model, optimizer, schedulers=[scheduler], window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS + HIGH[:8], after=scheduler.step)
    assert rewind.returns == 1 and scheduler.last_epoch == 112
    assert optimizer.param_groups[0]["lr"] == 0.5
    drive(rewind, model, optimizer, [1.0] * 40, after=scheduler.step)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.99), 0.99**144),
        (lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [140], 0.5), 0.5),
        (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 + 0.5 * (k < 140)), 0.5),
    ],
)
def test_a_scheduler_in_a_hook_goes_on_from_its_own_rates(make, rate):
    """Also from one that it sets where careful steps are at about that rate."""
    model, optimizer = one_weight()
    scheduler = make(optimizer)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS + HIGH[:8] + FALLS[-8:])
    assert rewind.returns == 1 and rewind.scale < 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_named_scheduler_that_tells_no_optimizer_is_of_all_of_them():
    model = nn.Linear(2, 1)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    scheduler = SimpleNamespace(state_dict=dict, load_state_dict=id, get_last_lr=lambda: [0.1])
    rewind = Rewind(model, optimizers, schedulers=[scheduler])
    for one in optimizers:
        one.param_groups[0]["lr"] = 0.2
    rewind._live.load(rewind._trusted)
    assert [one.param_groups[0]["lr"] for one in optimizers] == [0.1, 0.1]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_careful_step_leaves_the_rate_as_it_was(as_tensor):
    """Also where it changes the rate itself, as other steps may."""

    class Decays(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param -= group["lr"] * param.grad
                group["lr"] *= 0.99

    lr = torch.tensor(1.0, dtype=torch.float64) if as_tensor else 1.0
    rewind, model, optimizer = watched(Decays, lr=lr)
    (group,) = optimizer.param_groups
    drive(rewind, model, optimizer, FALLS + HIGH[:8])
    assert rewind.returns == 1
    drive(rewind, model, optimizer, FALLS[-8:])
    assert rewind.scale < 1 and float(group["lr"]) == pytest.approx(0.99**136)
    before, scale = model.weight.item(), rewind.scale
    drive(rewind, model, optimizer, FALLS[-1:])
    assert before - model.weight.item() == pytest.approx(scale * 0.99**136)


@pytest.mark.parametrize("how", ["save", "close"])
def test_an_error_in_a_careful_step_leaves_no_lowered_rate(how):
    class Stopped(torch.optim.SGD):
        now = False

        def step(self, closure=None):
            if self.now:
                raise KeyboardInterrupt
            super().step(closure)

    rewind, model, optimizer = watched(Stopped)
    drive(rewind, model, optimizer, FALLS + HIGH[:8])
    optimizer.now = True
    with pytest.raises(KeyboardInterrupt):
        drive(rewind, model, optimizer, FALLS[:1])
    assert rewind.scale < 1
    groups = optimizer.state_dict()["param_groups"] if how == "save" else optimizer.param_groups
    if how == "close":
        rewind.close()
    assert groups[0]["lr"] == 1


def test_a_state_that_is_saved_within_a_careful_step_leaves_it_careful():
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, FALLS + HIGH[:8])
    optimizer.register_step_pre_hook(lambda *_: optimizer.state_dict() and None)
    before, scale = model.weight.item(), rewind.scale
    drive(rewind, model, optimizer, FALLS[-1:])
    assert model.weight.item() == before - scale and optimizer.param_groups[0]["lr"] == 1
