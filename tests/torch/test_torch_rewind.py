"""``Rewind`` in PyTorch's loops: what it promises, schedulers, callbacks, and what it tells."""

import math
import signal

import numpy as np
import pytest
import torch
from models import loss_fn, minibatches, mlp
from rewinding import (
    FALLS,
    HIGH,
    WINDOW,
    Hostile,
    assert_same,
    drive,
    hostile_run,
    network,
    one_weight,
    train,
    watched,
)
from torch import nn
from torch.optim import lr_scheduler

from lossguard.torch import Rewind, RewindEvent
from lossguard.torch.rewind.rule import Rule
from lossguard.torch.tensors import leaves, zero_unsound


def test_it_goes_back_and_says_so(caplog):
    rewind, model, optimizer = watched(momentum=0.5)
    drive(rewind, model, optimizer, FALLS[:112])
    momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
    weight = model.weight.clone()
    drive(rewind, model, optimizer, FALLS[112:])
    drive(rewind, model, optimizer, HIGH[:7])
    assert not rewind.events
    drive(rewind, model, optimizer, HIGH[:1])
    assert rewind.events == [RewindEvent("return", "loss", 136, 24, 1, 0.5)]
    assert model.weight == weight
    assert optimizer.state[model.weight]["momentum_buffer"] == momentum
    assert rewind.thrown == 24 and rewind.returns == 1
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("lossguard.torch.rewind", "WARNING")
    assert record.message == (
        "Rewind threw 24 steps away and goes on at 0.5 of the rate (cause: loss, call 136)"
    )
    for call in range(32):
        assert rewind.scale == min(1.0, 0.5 + 0.5 * call / 16)  # between two reads as well
        drive(rewind, model, optimizer, [1.0])


@pytest.mark.usefixtures("as_ctrl_c")
def test_ctrl_c_waits_until_it_is_back():
    class Interrupts:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            signal.raise_signal(signal.SIGINT)

    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer, schedulers=[Interrupts()], window=WINDOW, every=4)
    with pytest.raises(KeyboardInterrupt):
        drive(rewind, model, optimizer, FALLS + HIGH)
    assert model.weight == -112 and rewind.thrown == 24 and len(rewind.events) == 1


@pytest.mark.parametrize("every", [1, 4, 16])
def test_in_every_run_it_is_finite_and_throws_away_no_more_than_it_may(every):
    seen = []
    for seed in range(4):
        excess, infinite = hostile_run(seed, every, seen)
        assert excess <= 0 and infinite == 0, seed
    assert np.max(seen, axis=0)[2] > WINDOW and (np.max(seen, axis=0) > 0).all()


def test_a_budget_that_is_not_kept_is_seen(monkeypatch):
    """By the same runs: the bound is one that can be broken."""
    monkeypatch.setattr(Rule, "may_return", lambda *_: True)
    assert max(hostile_run(seed, 4, [])[0] for seed in range(4)) > 0


def test_a_step_after_a_return_has_no_gradient_of_before_it():
    """In a loop that calls it too early: with that gradient the run would be ruined anew."""
    rewind, model, optimizer = watched()
    for k in range(160):
        ruins = 128 <= k < 136
        optimizer.zero_grad()
        (model.weight.sum() * (1e6 if ruins else 0.01)).backward()
        rewind.observe(9.0 if ruins else 1.0)
        optimizer.step()
    assert [event.call for event in rewind.events] == [136]
    assert -2 < model.weight.item() < 0


def test_a_step_whose_loss_alone_is_not_finite_is_taken_and_counts():
    """As where a loss overflows in half precision, and its gradients don't."""
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, FALLS + 400 * [math.inf])
    undone = len(FALLS) + 400 + model.weight.item()  # each step took 1 off, but slower ones less
    assert rewind.skipped == 0 and undone >= rewind.thrown > 32
    assert rewind.thrown <= 0.1 * rewind.calls + WINDOW and rewind.events[-1].kind == "unanswered"


def test_where_no_step_is_finite_none_is_taken():
    """Three returns throw 4 steps away each; then each step is taken back by itself, and skipped.

    After 8 of these there is an alarm, and what was known of the losses is forgotten.
    """
    model, _ = one_weight()
    optimizer = Hostile(model.parameters(), [math.nan] * 400)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    for _ in range(400):
        optimizer.step()
        rewind.observe(1.0)
    assert model.weight == 0 and rewind.scale == 0.5**6
    events = rewind.events
    assert [(event.call, event.in_a_row) for event in events[:5]] == [
        *((4, 1), (8, 2), (12, 3)),
        *((20, 0), (24, 1)),
    ]
    assert all(event.thrown <= 4 * (event.cause == "model") for event in events)
    alarms = sum(event.kind == "return" and event.cause == "loss" for event in events)
    assert rewind.thrown == sum(event.thrown for event in events)
    assert rewind.skipped == 400 - rewind.thrown - alarms


@pytest.mark.parametrize("loss", [math.nan, 1.0])
def test_minibatches_that_are_not_finite_lower_the_rate_once(loss):
    """The first alarm throws away what was learned since the snapshot; after it nothing was.

    The same if gradients alone aren't finite. Weight decay goes on in steps without gradients, and
    is taken back.
    """
    rewind, model, optimizer = watched(torch.optim.AdamW, weight_decay=0.1)
    drive(rewind, model, optimizer, FALLS)
    drive(rewind, model, optimizer, [loss] * 8, gradient=math.nan)
    before = model.weight.item()
    drive(rewind, model, optimizer, [loss] * 192, gradient=math.nan)
    first, *idle = rewind.events
    assert first.kind == "return" and [event.kind for event in idle] == ["idle"] * 24
    assert [event.call for event in idle] == list(range(144, 329, 8))
    assert 170 < idle[-1].skipped <= rewind.skipped and model.weight.item() == before
    assert str(idle[-1]) == (
        "Rewind set the model back, at the same rate: no step since then was finite (cause: loss, "
        f"call 328, {idle[-1].skipped} steps not finite so far)"
    )
    assert rewind.scale == 0.5 and rewind.returns == 1
    drive(rewind, model, optimizer, [1.0] * 64)
    assert rewind.scale == 1 and len(rewind.events) == 25


def test_steps_after_minibatches_that_are_not_finite_are_kept():
    """An alarm that is read late, when good steps have followed."""
    rewind, model, optimizer = watched(every=16)
    drive(rewind, model, optimizer, FALLS)
    drive(rewind, model, optimizer, [math.nan] * 24, gradient=math.nan)
    drive(rewind, model, optimizer, [1.0] * 8)
    assert [(event.call, event.skipped) for event in rewind.events] == [(144, 15)]
    drive(rewind, model, optimizer, [math.nan] * 8, gradient=math.nan)
    assert len(rewind.events) == 1


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.99**k),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 300),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=300),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 50),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.99), lr_scheduler.StepLR(o, 10, 0.9)]
    ),
}


@pytest.mark.parametrize(
    ("schedule", "tensor"), [*((name, False) for name in (*SCHEDULES, "by hand")), ("cosine", True)]
)
def test_the_schedule_goes_on_and_the_steps_are_scaled(schedule, tensor):
    """Between steps the rates are the schedule's own; what the steps add up to is scaled."""

    def rates(guarded):
        model, optimizer = one_weight(torch.optim.Adam, lr=0.5)
        if tensor:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        the_one = optimizer.param_groups[0]["lr"]
        scheduler = None if schedule == "by hand" else SCHEDULES[schedule](optimizer)
        rewind = Rewind(model, optimizer, window=WINDOW, every=4) if guarded else None
        between, used, scales = [], [], []
        optimizer.register_step_pre_hook(lambda o, *_: used.append(float(o.param_groups[0]["lr"])))
        for i, loss in enumerate([*FALLS, *HIGH[:8], *([1.0] * 100)]):
            scales.append(rewind.scale if rewind else 1.0)
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
            if scheduler:
                scheduler.step()
            else:
                for group in optimizer.param_groups:
                    group["lr"] = 0.5 / (1 + i)
            between.append(float(optimizer.param_groups[0]["lr"]))
            if rewind:
                rewind.observe(loss)
        return between, used, scales, optimizer.param_groups[0]["lr"] is the_one

    plain, guarded = rates(False), rates(True)
    assert guarded[0] == plain[0] and guarded[3] == plain[3]
    assert min(guarded[2]) == 0.5 and guarded[2][0] == guarded[2][-1] == 1
    np.testing.assert_allclose(guarded[1], np.multiply(plain[1], guarded[2]), rtol=1e-6)


@pytest.mark.parametrize("offload", [False, True])
def test_two_optimizers_of_a_model_are_rewound_as_one_of_two_groups_is(offload):
    runs = []
    for split in (False, True):
        torch.manual_seed(0)
        model = mlp()
        parts = [
            {"params": [*layer.parameters()], "lr": rate}
            for layer, rate in ((model[0], 0.01), (model[2], 0.003))
        ]
        groups = [[part] for part in parts] if split else [parts]
        optimizers = [torch.optim.AdamW(group) for group in groups]
        schedulers = [lr_scheduler.ExponentialLR(one, 0.999) for one in optimizers]
        options = {"schedulers": schedulers, "offload": offload, "window": WINDOW, "every": 4}
        rewind = Rewind(model, optimizers if split else optimizers[0], **options)
        numbers = []
        for call, batch in enumerate(minibatches(260)):
            loss = loss_fn(model, batch) * (50 if 150 <= call < 190 else 1)
            loss.backward()
            if call == 100:
                for p in model.parameters():
                    p.grad.fill_(math.nan)
            for one in (*optimizers, *schedulers):
                one.step()
            for one in optimizers:
                one.zero_grad()
            rewind.observe(loss)
            numbers.append((loss.item(), rewind.scale, schedulers[0].last_epoch))
            numbers.append([group["lr"] for one in optimizers for group in one.param_groups])
        assert rewind.returns >= 1 and rewind.skipped == 1
        saved = rewind.state_dict()
        runs.append((numbers, rewind.events, saved["trusted"]["model"], [*model.parameters()]))
    assert runs[0][:2] == runs[1][:2]
    torch.testing.assert_close(*([*leaves(one[2:])] for one in runs), rtol=0, atol=0)


def test_an_error_within_one_of_two_optimizers_leaves_the_rates_of_both():
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2)))
    optimizers = [
        torch.optim.SGD(one.parameters(), lr=lr) for one, lr in zip(model, (1.0, 0.5), strict=True)
    ]
    rewind = Rewind(model, optimizers, window=WINDOW, every=4)
    for loss in FALLS + HIGH[:8]:
        for one in optimizers:
            one.step()
        rewind.observe(loss)
    assert rewind.scale == 0.5

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizers[0].step(closure)
    assert optimizers[0].param_groups[0]["lr"] == 1.0  # at once
    optimizers[1].step()
    assert [one.param_groups[0]["lr"] for one in optimizers] == [1.0, 0.5]
    another = Rewind(model, optimizers[1])
    with pytest.raises(ValueError, match="Rewind must be open"):
        rewind.observe(1.0)
    another.observe(1.0)


def test_a_callback_may_make_the_optimizer_careful():
    """And may save: the event is over, with the model back and the scale lower."""
    model, optimizer = one_weight(momentum=0.5)
    heard = []

    def careful(event):
        assert rewind.events[-1] is event and rewind.scale == event.scale
        calls = rewind.state_dict()["rule"]["calls"]
        heard.append((event.kind, model.weight.item(), calls))
        for group in optimizer.param_groups:
            group["momentum"] = 0.0

    rewind = Rewind(model, optimizer, window=WINDOW, every=4, callback=careful)
    drive(rewind, model, optimizer, FALLS[:112])
    good = model.weight.item()
    drive(rewind, model, optimizer, FALLS[112:] + HIGH[:8])
    assert heard == [("return", good, 136)] and len(rewind.events) == 1
    drive(rewind, model, optimizer, [1.0])
    assert model.weight.item() == good - 0.5


@pytest.mark.parametrize(("level", "events"), [(0.3, [("return", "audit", 128)]), (0.25, [])])
def test_an_audit_sees_what_the_losses_do_not(level, events):
    """A fifth of the progress from 1.0 to 0.1 is 0.18."""
    model, optimizer = one_weight()
    audits = iter([1.0, 0.5, 0.2, 0.1, *[level] * 100])
    rewind = Rewind(model, optimizer, window=WINDOW, every=4, audit=lambda: next(audits))
    drive(rewind, model, optimizer, [1.0] * 112)
    assert not rewind.events
    drive(rewind, model, optimizer, [1.0] * 16)
    assert [(e.kind, e.cause, e.call) for e in rewind.events] == events
    assert model.weight == (-64 if events else -128)


@pytest.mark.parametrize(("level", "returns"), [(3.0, 0), (8.0, 1)])
def test_in_the_second_block_the_end_of_the_first_is_the_reference(level, returns):
    """From 10 to 1: medians and 0.95 quantiles are 5.2 and 10 of all, 1.6 and 2.8 of these four."""
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, [*np.linspace(10, 1, 16), *[level] * 8])
    assert rewind.returns == returns


def test_a_healthy_run_is_the_same_with_it():
    model, optimizer = network()
    rewind = Rewind(model, optimizer)
    train(model, optimizer, rewind, 0, 300)
    twin, its_optimizer = network()
    ignored = type("Ignored", (), {"observe": lambda self, loss: None})()
    train(twin, its_optimizer, ignored, 0, 300)
    assert_same(model, twin)
    assert not rewind.events and rewind.skipped == 0


def test_it_waits_for_the_device_at_reads_only(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as on another device
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in model]
    rewind = Rewind(model, optimizers, window=WINDOW, every=16)

    def step():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
        rewind.observe(torch.tensor(1.0))

    for _ in range(64):  # it looks at more before the first step, and before the first copy
        step()
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, real=real: (reads.append(1), real(self))[1]
        )
    for _ in range(64):
        step()
    assert len(reads) == 4
    p = nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones_like(p)
    zero_unsound([p])  # in a step; there is nothing to read there


@pytest.mark.parametrize(
    ("steps", "calls", "told"),
    [(0, 1, "16 calls for 0 steps"), (1, 2, "16 calls for 8"), (10, 1, "16 calls for 160 steps")],
)
def test_calls_and_steps_that_do_not_belong_together_are_told_once(steps, calls, told):
    rewind, _, optimizer = watched()
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(64):
            for _ in range(steps):
                optimizer.step()
            for _ in range(calls):
                rewind.observe(1.0)
    (warning,) = caught
    assert str(warning.message).startswith("Rewind.observe must be called once after each opt")
    assert told in str(warning.message) and warning.filename == __file__


def test_a_scaler_may_leave_out_steps_at_first(recwarn):
    rewind, _, optimizer = watched()
    for call in range(64):
        if call >= 12:
            optimizer.step()
        rewind.observe(1.0)
    assert not recwarn.list


def test_what_is_unread_at_the_end_can_be_read():
    rewind, model, optimizer = watched(every=16)
    drive(rewind, model, optimizer, FALLS[:100])
    model.weight.data.fill_(math.nan)
    assert not rewind.events
    rewind.read()
    (event,) = rewind.events
    assert (event.kind, event.cause, event.call) == ("return", "model", 100)
    assert model.weight.isfinite() and rewind.calls == 100
    rewind.read()  # nothing more to hear
    drive(rewind, model, optimizer, FALLS[100:])
    assert rewind.calls == 128 and not rewind._unread  # in step with blocks again


def test_what_is_unread_is_saved():
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, [1.0, 1.0], gradient=math.nan)
    twin, *_ = watched()
    twin.load_state_dict(rewind.state_dict())
    twin.read()
    assert (twin.calls, twin.skipped) == (2, 2)


def test_an_audit_may_set_the_model_to_evaluation():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(), nn.Dropout())
    model[2].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewind = Rewind(
        model, optimizer, window=WINDOW, every=4, audit=lambda: model.eval()(torch.ones(1))
    )
    for loss in FALLS:
        optimizer.step()
        rewind.observe(loss)
    assert [module.training for module in model] == [True, True, False]


@pytest.mark.parametrize("how", ["closed", "another", "nobody has it"])
def test_where_it_has_ended_steps_are_as_they_were(how):
    """Also where another hook comes after its own, as a guard's does."""
    rewind, model, optimizer = watched()
    optimizer.register_step_pre_hook(lambda *_: None)
    drive(rewind, model, optimizer, FALLS + HIGH[:8])
    assert rewind.scale == 0.5
    if how == "closed":
        rewind.close()
    elif how == "another":
        another = Rewind(model, optimizer, window=WINDOW, every=4)
        assert another.scale == 1
    else:
        del rewind
    before = model.weight.item()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert model.weight.item() == before - 1
    if how != "nobody has it":
        with pytest.raises(ValueError, match=r"^Rewind must be open, got one that close"):
            rewind.observe(1.0)


@pytest.mark.parametrize("by", ["position", "name"])
def test_gradients_that_a_closure_makes_move_nothing_if_they_are_not_finite(by):
    """As Lightning has every optimizer called."""
    rewind, model, optimizer = watched(every=1)

    def closure():
        model.weight.grad = torch.full_like(model.weight, math.nan)
        return torch.tensor(1.0)

    result = optimizer.step(closure) if by == "position" else optimizer.step(closure=closure)
    assert result == 1.0
    rewind.observe(1.0)
    assert model.weight.item() == 0 and rewind.skipped == 1 and not rewind.events


@pytest.mark.parametrize("bad", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_step_counts_once_whichever_optimizers_gradients_are_not_finite(
    bad, elsewhere, monkeypatch
):
    if elsewhere:  # as on another device, where flags and losses are tensors
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    rewind = Rewind(model, optimizers, window=WINDOW, every=4)
    for step in range(4):
        for k, part in enumerate(model):
            value = math.nan if step == 2 and k in bad else 1.0
            part.weight.grad = torch.full_like(part.weight, value)
            optimizers[k].step()
        rewind.observe(torch.tensor(1.0) if step % 2 else 1.0)
    assert rewind.skipped == bool(bad) and rewind.calls == 4
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_gradients_of_steps_between_two_calls_are_all_looked_at():
    rewind, model, optimizer = watched(every=1)
    for gradient in (math.nan, 1.0):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
    rewind.observe(1.0)
    assert rewind.skipped == 1


def test_a_sparse_gradient_that_is_not_finite_moves_nothing():
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    rewind = Rewind(model, optimizer, window=WINDOW, every=1)
    before = model.weight.detach().clone()
    (model(torch.tensor([1, 1])) * math.nan).sum().backward()
    optimizer.step()
    rewind.observe(1.0)
    assert torch.equal(model.weight, before) and rewind.skipped == 1


def test_a_rate_that_groups_share_is_scaled_once():
    """As PyTorch gives one tensor to all groups."""
    model, rate = nn.Linear(1, 1, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, lr=rate)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS + HIGH[:8], gradient=0.0)
    assert rewind.scale == 0.5
    before = model.weight.item()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert model.weight.item() == before - 0.5 and rate == 1.0
