"""What the guards of two optimizers promise: the price, the sum of losses, and a finite model."""

import math
import warnings

import numpy as np
import pytest
import torch
from models import (
    KINDS,
    check_of,
    closure_for,
    loss_fn,
    minibatches,
    mlp,
    quadratic,
    run,
    spiral,
    squares,
    step_by,
    twins,
    two,
    two_rates,
)
from torch import nn
from torch.optim import SGD, Adam

from lossguard.torch import BestOf, LossGuard, Recommended
from lossguard.torch.guards.decision import FALLBACK, Progress
from lossguard.torch.guards.lane import Lane
from tests.campaigns import torch_guards
from tests.campaigns.torch_guards import Hostile


@pytest.mark.parametrize("leads", ["fallback", "learned"])
def test_the_price_is_at_most_1_12_once_it_is_clear_who_leads(leads):
    model, calls = mlp(), []
    rates = (0.3, 1e-4) if leads == "learned" else (1e-9, 0.3)
    guard = two(Recommended, model, *(lambda ps, lr=lr: SGD(ps, lr=lr) for lr in rates))
    closures = [closure_for(guard, model, batch) for batch in minibatches(40)]
    for k in range(2000):
        guard.step(lambda k=k: calls.append(k) or closures[k % 40]())
    spent = sum(k >= 1000 for k in calls)
    assert spent <= 1120 and sum(d.gradients for d in [*guard.history][-100:]) == spent
    assert guard.steps == 2000


def test_the_live_lane_takes_the_steps_that_its_optimizer_would_alone():
    """Bit by bit: the fallback leads, and trials beside it leave no trace."""
    model, twin = twins()
    guard = two(Recommended, model, lambda ps: SGD(ps, lr=1e-9), lambda ps: Adam(ps, lr=0.01))
    alone = Adam(twin.parameters(), lr=0.01)
    homes = [p.data_ptr() for p in model.parameters()]
    for batch in minibatches(60) * 4:
        returned = guard.step(closure_for(guard, model, batch))
        assert torch.equal(returned, step_by(alone, loss_fn(twin, batch)))
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert homes == [p.data_ptr() for p in model.parameters()]
    assert not any(d.jumped for d in guard.history)
    assert sum(d.learned_updates for d in guard.history) > 0


@pytest.mark.parametrize("seed", range(4))
def test_promises_hold_against_hostile_optimizers(seed, tmp_path):
    """An attempt of the campaign: finite models, bounded prices, sums of losses."""
    with warnings.catch_warnings():
        torch_guards.attempt(seed, tmp_path)


def scripted(guard, losses, ruined=""):
    """A cycle in which lanes report the losses that are given by their names; one breaks."""
    for _ in range(guard.nt):
        for lane in guard.lanes():
            for p in guard.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            lane.step(losses[lane.name])
            if lane.name == ruined:
                guard.param_groups[0]["params"][0].data.fill_(math.nan)
    return guard.last_decision


def test_a_decision_says_where_the_model_jumps():
    """By which a moving average of weights knows that it begins again."""
    model = mlp()
    check, at = check_of(model), {}

    def noting(k):
        at[guard._live.holder.name] = [p.detach().clone() for p in model.parameters()]
        return check(k)

    guard = two(LossGuard, model, nt=2, check=noting)
    for batch in minibatches(60):
        leader = guard._leader.name
        guard.step(closure_for(guard, model, batch))
        if guard.phase == 0:  # its checks move nothing
            rows = zip(model.parameters(), at[leader], strict=True)
            moved = any(not torch.equal(p, q) for p, q in rows)
            assert guard.last_decision.jumped == moved
    assert {d.jumped for d in guard.history} == {True, False}


def test_best_of_checks_on_held_out_minibatches_by_their_numbers(monkeypatch):
    model, numbers, checks, enter = mlp(), [], [], Lane.enter

    def entered(lane, mode="train", **options):
        checks.append(mode == "eval")
        enter(lane, mode, **options)

    monkeypatch.setattr(Lane, "enter", entered)

    def check(k):
        numbers.append(k)
        return loss_fn(model, spiral())

    guard = two(BestOf, model, nt=2, check=check, nc=3)
    run(guard, model, minibatches(4))
    assert numbers == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert sum(checks) == 4  # once a cycle for each
    assert guard.last_decision.forwards == 6 and all(p.grad is None for p in model.parameters())

    def fails(k):
        raise KeyError

    guard.check = fails
    run(guard, model, minibatches(1))
    decided = len(guard.history)
    with pytest.raises(KeyError):
        run(guard, model, minibatches(1))
    assert guard.phase == 0 and guard._leader.live and len(guard.history) == decided
    guard.check = check
    run(guard, model, minibatches(4))
    assert len(guard.history) == decided + 2


def test_checks_draw_alike_for_all_and_leave_no_trace():
    """Of models that are checked in training mode."""
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.5))
    alike = [SGD(model.parameters(), lr=0.1) for _ in range(2)]
    guard = BestOf(alike, model=model, nt=2, check=lambda k: loss_fn(model, spiral()))
    run(guard, model, minibatches(8))
    first, second = guard.records
    assert first[:3] == second[:3] and first.weight > 3  # mean, weight, lowest
    assert model[1].num_batches_tracked == 8


def test_a_memory_that_is_not_finite_is_forgotten():
    model = mlp()
    ruined = Hostile(model.parameters(), lr=0.1, momentum=0.9)
    ruined.way, ruined.turn, ruined.by = "breaks", 4, math.nan
    guard = BestOf([ruined, SGD(model.parameters(), lr=0.1)], model=model, nt=4)
    run(guard, model, minibatches(4))
    assert not ruined.state


@pytest.mark.parametrize("lowest", [1e-310, 1e-150])
def test_losses_that_fall_to_next_to_nothing_are_extrapolated(lowest):
    """In double precision; Python raises where a power or a logarithm has no number."""
    fell = Progress(1000, lowest, lowest, earlier_age=250, earlier=1e300, later_age=500, later=1.0)
    rose = fell._replace(recent=1e300, earlier=lowest)
    assert fell.rate == -rose.rate > 300
    assert fell.expected_at(1.0) == rose.expected_at(1e6) == math.inf
    assert fell.expected_at(1e6) == 0


def test_a_check_may_set_the_mode_which_is_set_back():
    model = mlp(nn.Dropout(0.5))
    model[0].eval()  # a part that is frozen
    before = [module.training for module in model.modules()]

    def check(k):
        return loss_fn(model.eval(), spiral())

    run(two(BestOf, model, nt=2, check=check), model, minibatches(2))
    assert [module.training for module in model.modules()] == before


def test_best_of_follows_weights_that_are_loaded_before_the_first_call():
    weight, closure = quadratic(1.0)
    guard = two_rates(BestOf, weight, 0.1, 0.2, nt=1)
    with torch.no_grad():
        weight.fill_(2.0)
    guard.step(closure)
    guard.step(closure)
    assert weight.item() == pytest.approx(2 * 0.6**2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lane_may_not_be_told_apart_by_its_dropout(kind):
    """All lanes draw the same numbers for a minibatch, and the program goes on as after one."""
    weight, plain = quadratic()
    guard, seen, alone = two_rates(kind, weight, 0.01, 0.1), [], []

    def closure():
        seen.append(torch.rand(1).item())
        return plain()

    torch.manual_seed(3)
    for _ in range(5):
        guard.step(closure)
    torch.manual_seed(3)
    for _ in range(5):
        alone += [torch.rand(1).item()] * 2
    assert seen == alone


@pytest.mark.filterwarnings("ignore:closure gave different losses")
def test_a_hand_over_from_where_the_model_is_is_no_jump():
    weight, _ = quadratic(0.0)
    guard = two_rates(Recommended, weight, 1.0, 0.01)
    assert scripted(guard, {"y": 1.0, "z": 2.0}).jumped
    while (decision := scripted(guard, {"y": 1.0, "s": 2.0, "z": 2.0})).winner == 0:
        assert not decision.jumped
    assert decision.winner == 1 and not decision.jumped  # y has stalled, and z goes on from there


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_a_fallback_that_takes_over_warms_up(rate):
    """Its t-th step of ten is at t / 10 of its rate, which a checkpoint within them tells."""

    def build():
        weight = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
        bold, careful = SGD([weight], lr=0.01), SGD([weight], lr=rate)
        guard = Recommended(bold, careful, model=None)
        return weight, bold, careful, guard, squares(weight)

    def factor(weight, guard, closure):
        before = weight.item()
        guard.step(closure)
        return weight.item() / before

    weight, bold, careful, guard, closure = build()
    guard.step(closure)
    bold.param_groups[0]["lr"] = 0.3  # it wins its first trial
    while guard.last_decision is None or guard.last_decision.winner != FALLBACK:
        guard.step(closure)
        if guard.steps == 20:
            bold.param_groups[0]["lr"] = 0.0  # it stalls
    factors = [factor(weight, guard, closure) for _ in range(4)]
    assert careful.param_groups[0]["lr"] == 0.1  # between steps
    saved = guard.state_dict()
    weight, _, careful, guard, closure = build()
    guard.load_state_dict(saved)
    factors += [factor(weight, guard, closure) for _ in range(8)]
    parts = [*np.arange(1, 11) / 10, 1, 1]
    np.testing.assert_allclose(factors, 1 - 2 * 0.1 * np.array(parts), rtol=1e-6)
    assert careful.param_groups[0]["lr"] == 0.1


@pytest.mark.filterwarnings("ignore:lane y")
def test_a_return_after_an_error_is_a_jump():
    weight, closure = quadratic()
    guard = two_rates(LossGuard, weight, 0.1, 0.1, nt=2)

    def breaks():
        loss = closure()
        if guard.phase == 1:
            weight.data.fill_(torch.nan)
            raise RuntimeError("of the program's")
        return loss

    guard.step(closure)
    with pytest.raises(RuntimeError, match="of the program's"):
        for _ in range(2):
            guard.step(breaks)
    assert weight.item() == 4.0
    for _ in range(2):
        guard.step(closure)
    assert guard.last_decision.jumped


def test_a_loop_that_is_left_and_closed_late_leaves_the_next_one_alone():
    weight, closure = quadratic()
    guard = BestOf([SGD([weight], lr=0.1)], model=None, nt=1)
    left = guard.lanes()
    next(left)
    for lane in guard.lanes():
        drawn = torch.rand(1)
        loss = closure()
        left.close()
        assert drawn != torch.rand(1)
        lane.step(loss)
    assert guard.steps == 1


def test_calls_within_a_minibatch_are_refused():
    weight, closure = quadratic()
    guard = two_rates(Recommended, weight, 0.1, 0.01)
    saved = guard.state_dict()
    calls = {"state_dict": guard.state_dict, "eval": guard.eval}
    for lane in guard.lanes():
        for name, call in calls.items():
            with pytest.raises(ValueError, match=rf"^{name} must be called between minibatches, "):
                call()
        lane.step(closure())
    for call in calls.values():
        call()
    with pytest.raises(ValueError, match=r"^load_state_dict must be called between minibatches$"):
        for lane in guard.lanes():
            guard.load_state_dict(saved)
            lane.step(closure())
    assert guard.phase == 0 and guard._leader.live


def test_memory_that_can_not_be_saved_is_refused():
    """Keys would be strings after loading, and the memory lost."""

    class Odd(SGD):
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1 * p.grad)
                self.state[p] = {0: p.grad.clone()}

    weight, closure = quadratic()
    guard = Recommended(SGD([weight], lr=0.1), Odd([weight], lr=0.1), model=None, nt=1)
    guard.step(closure)
    with pytest.raises(ValueError, match=r"^memory of a parameter must have strings"):
        guard.state_dict()


def test_a_scheduler_on_a_guard_in_a_loop_over_lanes_does_not_warn():
    weight, closure = quadratic()
    guard = two_rates(Recommended, weight, 0.1, 0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(guard, 0.9)
    for _ in range(3):
        for lane in guard.lanes():
            lane.step(closure())
        scheduler.step()


def test_a_scheduler_begins_where_the_optimizer_of_a_running_job_is():
    weight, closure = quadratic()
    fallback, learned = SGD([weight], lr=0.1), SGD([weight], lr=0.3)
    old = torch.optim.lr_scheduler.ExponentialLR(fallback, 0.5)
    for _ in range(3):
        fallback.step()
        old.step()
    guard = Recommended(learned, fallback, model=None)
    torch.optim.lr_scheduler.LambdaLR(guard, lambda k: 0.9**k)
    guard.step(closure)
    assert fallback.param_groups[0]["lr"] == 0.0125 and learned.param_groups[0]["lr"] == 0.3


def test_a_scheduler_that_would_multiply_rates_of_0_is_refused():
    """A warm-up from 0 on the fallback has set its rate before the guard was built."""
    weight, closure = quadratic()
    fallback, learned = SGD([weight], lr=0.1), SGD([weight], lr=0.3)
    torch.optim.lr_scheduler.LambdaLR(fallback, lambda k: k / 10)
    guard = Recommended(learned, fallback, model=None)
    guard.step(closure)  # the fallback's own scheduler may go on
    torch.optim.lr_scheduler.LambdaLR(guard, lambda k: min(1, k / 10))
    with pytest.raises(ValueError, match=r"^rates must be positive when the guard is built, for a"):
        guard.step(closure)
