"""Schedulers on a guard, and on its optimizers."""

import pytest
import torch
from models import (
    KINDS,
    backward,
    closure_for,
    guard_of,
    loss_fn,
    minibatches,
    mlp,
    quadratic,
    run,
    spiral,
    two,
)
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from lossguard.torch import BestOf, Recommended


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_one_schedule_drives_both_in_proportion(number):
    """Tensors as rates are changed in place."""
    model = mlp()
    guard = two(Recommended, model, nt=2)
    fallback, learned = (one for one in guard._optimizers.values())
    scheduler = LambdaLR(guard, lambda t: number(min(1, t / 4)))  # a warm-up from 0
    seen = []
    for batch in minibatches(6):
        guard.step(closure_for(guard, model, batch))
        seen.append((learned.param_groups[0]["lr"], fallback.param_groups[0]["lr"]))
        scheduler.step()
    factors = [0, 0.25, 0.5, 0.75, 1, 1]
    assert seen == [pytest.approx((0.05 * f, 0.3 * f)) for f in factors]


def test_one_schedule_drives_all_rates_of_a_function():
    weight, closure = quadratic(1.0)
    rates = [torch.tensor(0.1), torch.tensor(0.4)]
    guard = BestOf(lambda rate: AdamW([weight], lr=rate), rates=rates, model=None, nt=1)
    guard.param_groups[0]["lr"] = 0.05
    guard.step(closure)
    assert [float(rate) for rate in rates] == pytest.approx([0.05, 0.2])  # the tensors themselves


@pytest.mark.parametrize("first", ["guard", "schedulers"])
def test_each_may_have_a_schedule_of_its_own(first):
    """Built before the guard, or after it: a scheduler wraps its optimizer's step."""
    model = mlp()
    optimizers = [SGD(model.parameters(), lr=0.3), Adam(model.parameters(), lr=0.05)]

    def schedules():
        pairs = zip(optimizers, (0.5, 0.1), strict=True)
        return [StepLR(one, 1, gamma) for one, gamma in pairs]

    schedulers = schedules() if first == "schedulers" else []
    guard = BestOf(optimizers, model=model, nt=2)
    schedulers = schedulers or schedules()
    for batch in minibatches(2):
        guard.step(closure_for(guard, model, batch))
        for scheduler in schedulers:
            scheduler.step()
    rates = [one.param_groups[0]["lr"] for one in optimizers]
    assert rates == pytest.approx([0.3 * 0.25, 0.05 * 0.01])
    guard.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"^rates must be set in the guard's groups or in its opt"):
        guard.step(closure_for(guard, model, spiral()))


class Shrinking(SGD):
    """Sets a rate of its own in each step."""

    def step(self, closure=None):
        super().step()
        self.param_groups[0]["lr"] *= 0.9


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["first", "last"])
def test_a_scheduler_of_an_optimizer_is_stepped_between_minibatches(kind, of, late):
    """In a body or closure it would step once for each lane."""
    model, batch = mlp(), spiral()
    optimizers = [Shrinking(model.parameters(), lr=0.1) for _ in range(2)]
    guard = guard_of(kind, optimizers, model)
    scheduler = StepLR(optimizers[-1 if of == "last" else 0], 1, 0.5)

    def step(*schedulers):
        if late:
            for lane in guard.lanes():
                lane.step(backward(loss_fn(model, batch)))
                [one.step() for one in schedulers]
        else:

            def closure():
                [one.step() for one in schedulers]
                return backward(loss_fn(model, batch))

            guard.step(closure)

    for _ in range(3):
        step()
        scheduler.step()
    with pytest.raises(ValueError, match=r"^rates must be set between minibatches, got another"):
        step(scheduler)


def test_other_options_are_handed_on_to_who_has_them():
    model = mlp()
    guard = two(Recommended, model, lambda ps: Adam(ps, lr=0.1, weight_decay=0.1))
    OneCycleLR(guard, max_lr=0.3, total_steps=10)  # of momentum too, which Adam hasn't
    guard.param_groups[0]["weight_decay"] = 0.5
    guard.step(closure_for(guard, model, spiral()))
    fallback, learned = (one.param_groups[0] for one in guard._optimizers.values())
    assert learned["weight_decay"] == fallback["weight_decay"] == 0.5
    assert fallback["momentum"] == 0.95 and "momentum" not in learned
    assert fallback["lr"] == pytest.approx(0.3 / 25)
    assert learned["lr"] == pytest.approx(0.1 / 25)


def test_of_betas_only_the_momentum_that_is_cycled_is_handed_on():
    model = mlp()
    betas = ((0.9, 0.999), (0.8, 0.95))
    optimizers = [Adam(model.parameters(), lr=0.1, betas=pair) for pair in betas]
    optimizers.append(Adam(model.parameters(), lr=0.1))
    optimizers[2].param_groups[0]["betas"] = (0.7, 0.9, 0.99)  # as Adan has
    guard = BestOf(optimizers, model=model)
    OneCycleLR(guard, max_lr=0.3, total_steps=10)
    guard._rates.apply()
    made = [one.param_groups[0]["betas"] for one in optimizers]
    assert made == [(0.95, 0.999), (0.95, 0.95), (0.95, 0.9, 0.99)]


def test_a_rate_that_was_0_and_groups_out_of_proportion_are_refused():
    model = mlp()
    guard = two(Recommended, model, fallback=lambda ps: SGD(ps, lr=0.0))
    guard.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"^rates must be positive when the guard is built"):
        guard.step(closure_for(guard, model, spiral()))

    def split(ps):
        return SGD([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.2}], lr=0.1)

    guard = two(Recommended, model, fallback=split)
    guard.param_groups[0]["lr"], guard.param_groups[1]["lr"] = 0.01, 0.02
    guard.step(closure_for(guard, model, spiral()))  # both a tenth
    assert guard._optimizers["learned"].param_groups[0]["lr"] == pytest.approx(0.005)
    guard.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"^rates of the guard's groups must change in proportion"):
        guard.step(closure_for(guard, model, spiral()))


@pytest.mark.parametrize("rate", [float("nan"), torch.tensor(float("inf"))])
def test_a_rate_that_is_not_finite_reaches_nobody(rate):
    model = mlp()
    guard = two(Recommended, model)
    guard.param_groups[0]["lr"] = rate
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^rates must be finite, got (nan|inf)$"):
        guard.step(closure_for(guard, model, spiral()))
    optimizers = list(guard._optimizers.values())
    assert [one.param_groups[0]["lr"] for one in optimizers] == [0.3, 0.05]
    assert all(map(torch.equal, before, model.parameters()))
    guard.param_groups[0]["lr"] = 0.15
    guard.step(closure_for(guard, model, spiral()))
    assert [one.param_groups[0]["lr"] for one in optimizers] == pytest.approx([0.15, 0.025])


def test_an_optimizer_may_find_its_rate_by_itself():
    """As Adafactor of transformers, whose rate is None: no schedule drives it, which is told."""

    class Own(SGD):
        def step(self, closure=None):
            self.param_groups[0]["lr"] = 0.1
            super().step(closure)
            self.param_groups[0]["lr"] = None

    def own(ps):
        optimizer = Own(ps, lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    model = mlp()
    guard = two(Recommended, model, own, nt=2)
    run(guard, model, minibatches(4))
    guard.param_groups[0]["lr"] = 0.1
    with pytest.warns(RuntimeWarning, match="an optimizer without lr isn't driven by the"):
        guard.step(closure_for(guard, model, spiral()))


def test_a_schedule_is_resumed():
    model, twin = mlp(), mlp()
    guard, other = two(Recommended, model, nt=2), two(Recommended, twin, nt=2)
    guard.param_groups[0]["lr"] = 0.15
    guard.step(closure_for(guard, model, spiral()))
    guard.param_groups[0]["lr"] = 0.1  # as a scheduler does after the step
    other.load_state_dict(guard.state_dict())
    assert other.param_groups[0]["lr"] == 0.1
    assert other._optimizers["learned"].param_groups[0]["lr"] == pytest.approx(0.05 / 3)
    for one, its_model in ((guard, model), (other, twin)):
        one.param_groups[0]["lr"] = 0.03
        one.step(closure_for(one, its_model, spiral()))
        assert one._optimizers["learned"].param_groups[0]["lr"] == pytest.approx(0.005)


def test_a_schedule_drives_an_optimizer_that_was_loaded_later_and_skips_empty_groups():
    """Which has other dictionaries for its groups then."""
    model = nn.Linear(2, 2, bias=False)
    groups = [{"params": [model.weight]}, {"params": [], "weight_decay": 0.0}]
    optimizers = [AdamW([dict(group) for group in groups], lr=rate) for rate in (0.4, 0.1)]
    guard = Recommended(*optimizers, model=model)
    for one in optimizers:
        one.load_state_dict(one.state_dict())
    guard.param_groups[0]["lr"] = 0.05
    guard.step(closure_for(guard, model, spiral()))
    rates = [one.param_groups[0]["lr"] for one in optimizers]
    assert rates == pytest.approx([0.2, 0.05])


def test_a_group_at_rate_0_stays_there():
    """Such as a frozen part, beside one that the schedule on the guard drives."""
    v, w = (nn.Parameter(torch.ones(2)) for _ in range(2))

    def optimizer(rate):
        return SGD([{"params": [v], "lr": 0.0}, {"params": [w], "lr": rate}])

    one, other = optimizer(0.2), optimizer(0.1)
    guard = Recommended(one, other, model=None)
    schedule = torch.optim.lr_scheduler.ExponentialLR(guard, 0.5)
    for _ in range(3):
        for lane in guard.lanes():
            lane.step(backward((v + w).square().sum()))
        schedule.step()
    assert [group["lr"] for group in one.param_groups] == [0, 0.05]
    assert torch.equal(v, torch.ones(2)) and (w < 1).all()
