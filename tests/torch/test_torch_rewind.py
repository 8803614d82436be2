"""``Rewind`` as a whole: what it does in runs that go wrong, and in those that don't."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import loss_fn, minibatches, mlp, step_by
from rewinding import (
    FAULT,
    assert_same,
    calm,
    drive,
    hostile_run,
    hurt,
    network,
    one_weight,
    train,
    watched,
)

from lossguard.torch import Rewind
from lossguard.torch.rewind.response import CAREFUL, DEEPEST, REST, TRIALS, Response


def kinds_of(rewind):
    return [event.kind for event in rewind.events]


def test_a_calm_run_is_as_without_it():
    plain, watched_run = network(), network()
    for model, optimizer in (plain, watched_run):
        rewind = Rewind(model, optimizer)
        if model is plain[0]:
            rewind.close()
            rewind.observe = lambda loss: None
        train(model, optimizer, rewind, 0, 300)
    assert not rewind.events
    assert_same(plain[0], watched_run[0])


def test_a_return_that_helps_stays():
    """The losses are high from weights of -160 on."""
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, calm(130))
    hurt(rewind, model, optimizer, 70)
    trial, back = rewind.events
    assert (trial.kind, back.kind, back.cause) == ("trial", "return", "loss")
    assert trial.since == back.since == 128 and 24 <= back.thrown + 128 - 160 < 48
    assert back.call - trial.call == 8 and rewind.scale == 0.5
    assert rewind.returns == 1 and rewind.discarded == back.thrown
    # Back at -128, then at half the rate.
    assert model.weight.item() == -128 - 0.5 * (200 - trial.call)


def test_a_return_that_does_not_help_is_taken_back_to_the_last_bit():
    """The data have got harder: it costs the steps of a trial, and no rate."""
    rewind, model, optimizer = watched(torch.optim.Adam, lr=0.1)
    drive(rewind, model, optimizer, calm(160))
    while not rewind.events:
        drive(rewind, model, optimizer, calm(1, 2.0, first=rewind.calls))
    call = rewind.calls
    while len(rewind.events) == 1:
        assert rewind.scale == 0.5
        drive(rewind, model, optimizer, calm(1, 2.0, first=rewind.calls))
    assert kinds_of(rewind) == ["trial", "forward"]
    assert 8 <= rewind.calls - call == rewind.discarded <= 64
    assert rewind.scale == 1 and rewind.returns == 0
    plain, its_optimizer = one_weight(torch.optim.Adam, lr=0.1)
    drive(SimpleNamespace(observe=id), plain, its_optimizer, [1.0] * call)
    assert_same(plain, model)
    assert optimizer.state[model.weight] == its_optimizer.state[plain.weight]
    drive(rewind, model, optimizer, calm(500, 2.0, first=500))
    assert len(rewind.events) == 2  # the level is learned


def test_if_it_happens_again_means_are_stronger_and_all_come_back():
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, calm(130))
    for _ in range(3):
        before = rewind.returns
        while rewind.returns == before:
            hurt(rewind, model, optimizer, 1)
    told = [event.means for event in rewind.events if event.kind == "return"]
    assert told == [(), ("memory",), ("memory", "clipping")]
    assert rewind.scale == 1 / 8 and rewind._steps.clips
    drive(rewind, model, optimizer, calm(2 * REST + 16, first=1000), gradient=0.0)
    assert rewind.scale == 1 and not rewind._steps.clips


def test_a_model_that_is_not_finite_goes_back_and_further_if_it_is_so_again():
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, calm(140))
    for since in (128, 64, 64):
        model.weight.data.fill_(math.nan)
        drive(rewind, model, optimizer, calm(4))
        event = rewind.events[-1]
        assert (event.kind, event.cause, event.since) == ("return", "model", since)
        assert model.weight.item() == -since
    drive(rewind, model, optimizer, calm(64))
    model.weight.data.fill_(math.nan)
    drive(rewind, model, optimizer, calm(4))
    assert rewind.events[-1].since > 128


def test_a_run_that_is_never_finite_stays_where_it_began():
    rewind, model, optimizer = watched(every=16)
    drive(rewind, model, optimizer, [math.nan] * 400, gradient=math.nan)
    assert model.weight.item() == 0 and rewind.skipped == 400
    assert [e.skipped for e in rewind.events if e.kind == "skipped"][:4] == [16, 32, 64, 128]
    assert rewind.discarded <= 256 + 40


@pytest.mark.parametrize("better", [True, False])
def test_with_an_audit_no_steps_are_lost_to_a_trial(better):
    """The held-out loss tells a worse model from harder data."""
    model, optimizer = one_weight()
    asked = []

    def audit(number):
        asked.append(number)
        model.eval()
        return 1.0 + 0.1 * math.sin(number) + (0.5 * (model.weight.item() < -160) * better)

    rewind = Rewind(model, optimizer, every=4, audit=audit)
    drive(rewind, model, optimizer, calm(160))
    assert not asked
    while not rewind.events:
        drive(rewind, model, optimizer, calm(1, 2.0, first=rewind.calls))
    (event,) = rewind.events
    assert (event.kind, event.cause) == ("return" if better else "forward", "audit")
    assert rewind.returns == better and rewind._run.response.fruitless == 0
    assert asked == [*range(8)] * 2 if better else len(asked) == 32
    assert model.training and rewind.scale == (0.5 if better else 1)
    assert model.weight.item() == (-128 if better else -rewind.calls)


def test_audits_that_are_infinite_decide_nothing_or_all():
    for at_snapshot, kind in ((math.inf, "forward"), (1.0, "return")):
        model, optimizer = one_weight()
        options = {"every": 4}
        options["audit"] = lambda number, model=model, then=at_snapshot: (
            math.inf if model.weight.item() < -160 else then
        )
        rewind = Rewind(model, optimizer, **options)
        drive(rewind, model, optimizer, calm(160))
        drive(rewind, model, optimizer, calm(60, 2.0))
        assert kinds_of(rewind)[0] == kind


def test_log_tells_and_changes_nothing():
    plain, logged = network(), network()
    for model, optimizer in (plain, logged):
        rewind = Rewind(model, optimizer, action="log")
        if model is plain[0]:
            rewind.close()
            rewind.observe = lambda loss: None
        train(model, optimizer, rewind, 0, 300, FAULT)
    assert_same(plain[0], logged[0])
    assert {*kinds_of(rewind)} == {"unanswered"} and not [*rewind._run.store]
    before = len(rewind.events)
    next(model.parameters()).data.fill_(math.nan)
    rewind.read()
    rewind.read()
    assert rewind.events[-1].cause == "model" and len(rewind.events) == before + 1


@pytest.mark.parametrize("seed", range(12))
def test_the_budget_holds_and_the_model_is_finite_in_hostile_runs(seed):
    excess, infinite, rewind = hostile_run(seed, every=(1, 4, 16)[seed % 3])
    assert excess <= 0 and infinite == 0
    response = rewind._run.response
    assert response.fruitless <= TRIALS + 0.01 * response.calls


def test_the_rate_is_whole_after_so_many_quiet_steps_whatever_happened():
    rng = np.random.default_rng(0)
    for _ in range(50):
        response = Response(0.1)
        for _ in range(rng.integers(1, 20)):
            response.stayed(1)
            response.pass_by(int(rng.integers(0, 600)))
        assert 2.0**-DEEPEST <= response.scale <= 1
        response.pass_by(1024)
        assert response.scale == 1
    response.pass_by(REST)
    for rate in (1 / 2, 1 / 4, 1 / 8):
        response.stayed(1)
        assert response.scale == rate
    response.pass_by(CAREFUL)
    assert response.scale == 1 / 4
    response.pass_by(REST - CAREFUL)
    assert response.scale == 1 / 2
    response.pass_by(REST)
    assert response.scale == 1


def test_budgets():
    response = Response(0.1)
    assert response.may_return(256) and not response.may_return(257)
    assert response.longest_trial == 64
    response.failed(8)
    assert response.longest_trial == 56
    response.failed(56)
    assert response.longest_trial == 0 and not response.may_return(193)
    response.pass_by(6400)
    assert response.longest_trial == 64 and response.may_return(256 + 639 - 64)
    assert not response.may_return(256 + 640 - 64)


def test_a_large_rise_is_undone_after_a_trial_that_came_to_nothing():
    """What is left of the budget is enough for a short trial."""
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, calm(130))
    rewind._run.response.failed(8)
    hurt(rewind, model, optimizer, 1)
    while rewind.returns == 0:
        hurt(rewind, model, optimizer, 1)
        assert rewind.calls < 300
    assert kinds_of(rewind)[-2:] == ["trial", "return"]


@pytest.mark.parametrize("every", [3, 16])
def test_a_trial_ends_at_its_looks_however_often_losses_are_read(every):
    rewind, model, optimizer = watched(every=every)
    drive(rewind, model, optimizer, [*calm(130), *calm(130, 3.0)])
    assert kinds_of(rewind)[:2] == ["trial", "forward"]
    assert rewind._run.response.fruitless % 8 == 0


def test_where_a_return_is_too_dear_it_tells_and_goes_on():
    rewind, model, optimizer = watched(options={"rho": 0.0})
    drive(rewind, model, optimizer, calm(130))
    for _ in range(20):
        hurt(rewind, model, optimizer, 40)
    assert rewind.discarded <= 256 and kinds_of(rewind)[-1] == "unanswered"


def test_read_sees_a_step_that_was_not_observed():
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, calm(4))
    model.weight.data.fill_(math.nan)
    rewind.read()
    assert rewind.returns == 1 and model.weight.item() == 0


def test_observe_must_follow_steps():
    rewind, model, optimizer = watched()
    for _ in range(15):
        rewind.observe(1.0)
    with pytest.raises(ValueError, match=r"^Rewind.observe must follow steps, got 16 calls and no"):
        rewind.observe(1.0)
    for steps in (0, 3):
        rewind, model, optimizer = watched()
        drive(rewind, model, optimizer, calm(16))
        with pytest.warns(RuntimeWarning, match=f"got 16 calls for {16 * steps} steps$"):
            for _ in range(16):
                for _ in range(steps):
                    optimizer.step()
                rewind.observe(1.0)


def test_a_step_that_a_scaler_leaves_out_is_no_error():
    model, optimizer = network()
    rewind = Rewind(model, optimizer, every=1)
    for _ in range(3):
        rewind.observe(1.0)
    assert rewind.calls == 3 and not rewind.events


def test_it_tells(caplog):
    told = []
    rewind, model, optimizer = watched(options={"callback": told.append})
    drive(rewind, model, optimizer, calm(130))
    hurt(rewind, model, optimizer, 70)
    assert told == rewind.events
    assert [record.message for record in caplog.records] == [str(event) for event in told]
    assert str(told[-1]).startswith("Rewind threw ") and "since call 128" in str(told[-1])
    numbers = rewind.logged()
    assert json.dumps(numbers) and numbers["returns"] == 1 and numbers["scale"] == 0.5
    assert numbers["discarded"] == told[-1].thrown
    rows = rewind.history
    assert [row.call for row in rows] == [*range(4, 201, 4)]
    assert rows[0].loss == pytest.approx(np.mean(calm(4)))
    assert {row.scale for row in rows} == {1.0, 0.5} and sum(row.on_trial for row in rows) == 2
    assert max(row.score for row in rows) > rows[0].threshold / 2


def test_another_one_of_the_same_optimizer_closes_it():
    rewind, model, optimizer = watched()
    again = Rewind(model, optimizer)
    with pytest.raises(ValueError, match=r"^Rewind must be open, got one that close"):
        drive(rewind, model, optimizer, calm(1))
    drive(again, model, optimizer, calm(1))


def test_once_nobody_has_it_the_hooks_do_nothing():
    rewind, model, optimizer = watched()
    drive(rewind, model, optimizer, calm(1))
    rewind._steps.scale = 0.5
    del rewind
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert model.weight.item() == -2


def test_several_optimizers_go_back_together():
    model = mlp()
    parts = [torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[2].parameters(), 0.1)]
    rewind = Rewind(model, parts, every=4)
    for batch in minibatches(80):
        for one in parts:
            one.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        for one in parts:
            one.step()
        rewind.observe(loss)
    at = [one.content for one in rewind._run.store][-1]["model"]["0.weight"].clone()
    model[2].weight.data.fill_(math.inf)
    rewind.read()
    assert torch.equal(model[0].weight, at) and model[2].weight.isfinite().all()
    assert parts[0].state[model[0].weight]["step"] == 64


def test_steps_with_closures_are_gated_too():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewind = Rewind(model, optimizer, every=4)
    for k, batch in enumerate(minibatches(40)):

        def closure(batch=batch, k=k):
            optimizer.zero_grad()
            loss = loss_fn(model, batch) * (math.nan if k == 9 else 1)
            loss.backward()
            return loss

        rewind.observe(optimizer.step(closure))
    assert rewind.skipped == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_losses_on_a_device_are_read_at_once():
    """Nothing of a step is asked before the read."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewind = Rewind(model, optimizer, every=16)
    for k, batch in enumerate(minibatches(31)):
        rewind.observe(step_by(optimizer, loss_fn(model, batch)))
        assert len(rewind._unread) == (k + 1) % 16
    rewind.read()
    assert rewind.calls == 31 and not rewind._unread
