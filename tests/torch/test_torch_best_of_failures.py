"""Optimizers on paths of their own: what isn't finite, and what is left after errors."""

import math

import pytest
import torch
from models import (
    Breaks,
    Diverges,
    assert_same_state,
    loss_fn,
    minibatches,
    mlp,
    quadratic,
    run,
    spiral,
)
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam

from lossguard.torch import BestOf, LossGuard, ResidualGuard

NT = 3


def test_what_is_not_finite_begins_anew_at_x():
    w, closure = quadratic()
    learned = Diverges([w], lr=0.4)
    guard = BestOf(learned, SGD([w], lr=0.1), nt=2)
    for _ in range(12):
        guard.step(closure)
    winners = [decision.winner for decision in guard.history]
    assert winners == [0, 0, 0, 0, 1, 0]  # its loss overflows in the fifth cycle
    assert [decision.finite_learned for decision in guard.history] == [True] * 4 + [False, True]
    assert [decision.reset_learned for decision in guard.history] == [False] * 4 + [True, False]
    assert w.item() == pytest.approx(4 * 0.8**10 * 0.2**2)


@pytest.mark.parametrize("lost", [math.inf, -math.inf, math.nan])
def test_a_bad_loss_of_the_fallback_alone_does_not_throw_it_away(lost):
    """Its parameters are finite, as where such a step is skipped: it goes on, and is ahead."""
    w, _ = quadratic()
    guard = BestOf(SGD([w], lr=1e-4), SGD([w], lr=0.1), nt=2)
    for call in range(12):

        def closure(call=call):
            loss = w.square().sum()
            if call == 7 and loss < 4:  # of the fallback's path
                return loss * lost
            loss.backward()
            return loss

        guard.step(closure)
    assert [decision.winner for decision in guard.history] == [1] * 6
    assert w.item() == pytest.approx(4 * 0.8**11)


def test_infinite_losses_of_both_signs():
    w, _ = quadratic()
    guard = BestOf(SGD([w], lr=0.4), SGD([w], lr=0.1), nt=2)
    for call in range(6):

        def closure(call=call):
            loss = w.square().sum()
            loss.backward()
            return loss * {2: math.inf, 3: -math.inf}.get(call, 1)

        guard.step(closure)
    assert [decision.winner for decision in guard.history] == [0, 0, 0]


def test_a_minibatch_that_is_lost_on_all_does_not_count():
    w, _ = quadratic()
    guard = BestOf(SGD([w], lr=0.4), SGD([w], lr=0.1), nt=1)
    for factor in (1.0, 1.0, math.nan, 1.0):

        def closure(factor=factor):
            loss = w.square().sum()
            loss.backward()
            return loss * factor

        guard.step(closure)
    assert [decision.winner for decision in guard.history] == [1, 0, 0, 0]
    assert not any(decision.reset_learned for decision in guard.history)


def test_if_none_is_finite_x_stays_and_all_begin_anew():
    w, closure = quadratic()
    guard = BestOf(SGD([w], lr=1e38), SGD([w], lr=1e38), nt=2)
    for _ in range(4):
        guard.step(closure)
    assert [decision.winner for decision in guard.history] == [-1, -1]
    assert guard.last_decision.reset_learned and guard.last_decision.reset_fallback
    assert w.item() == 4.0


def test_schedule_free_is_not_moved_by_an_error_of_the_closure():
    """Where it isn't followed it goes on from where it is, in the training mode that it is in."""
    package = pytest.importorskip("schedulefree")
    ends = []
    for fails in (False, True):
        torch.manual_seed(0)
        model, batches = mlp(), minibatches()
        ahead = Adam(model.parameters(), lr=0.02)
        free = package.SGDScheduleFree(model.parameters(), lr=0.01)
        guard = BestOf(free, ahead, nt=NT)
        run(guard, model, batches[: 2 * NT])
        if fails:
            with pytest.raises(KeyError):
                guard.step(lambda: {}["loss"])
        run(guard, model, batches[2 * NT : 4 * NT])
        assert [decision.winner for decision in guard.history] == [1] * 4
        ends.append(guard._paths.all[0].copy)
    assert_same_state(*ends)


@pytest.mark.parametrize("kind", [BestOf, LossGuard])
def test_an_interrupt_of_the_decision_loses_the_cycle_alone(kind, monkeypatch):
    w, closure = quadratic()
    guard = kind(SGD([w], lr=0.4), SGD([w], lr=0.1), nt=2)
    calls = guard.nt + getattr(guard, "nc", 0)
    for _ in range(calls):
        guard.step(closure)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"lossguard.torch.{kind.__module__.rsplit('.')[-1]}.outcome", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(calls):
                guard.step(closure)
    assert len(guard.history) == 1 and guard.phase == 0
    for done in range(calls):
        assert guard.phase == done
        guard.step(closure)
    assert len(guard.history) == 2 and guard.phase == 0


@pytest.mark.parametrize("nc", [0, 1])
def test_if_no_minibatch_counts_the_losses_are_nan(nc):
    w, _ = quadratic()
    guard = BestOf(SGD([w], lr=0.4), SGD([w], lr=0.1), nt=1, nc=nc)

    def closure():
        loss = w.square().sum()
        loss.backward()
        return loss * math.nan

    for _ in range(1 + nc):
        guard.step(closure)
    decision = guard.last_decision
    assert math.isnan(decision.learned_loss) and math.isnan(decision.fallback_loss)
    assert guard.records == [0.0, 0.0] and decision.winner == 1


def with_a_fallback_that_began_anew():
    """Whose record is level with that of the learned lane, which is followed."""
    w, closure = quadratic()
    guard = BestOf(SGD([w], lr=0.4), Breaks([w], lr=0.1), nt=1)
    for _ in range(2):
        guard.step(closure)
    assert guard.last_decision.winner == 0 and guard.records[0] == guard.records[1]
    return guard, w, closure


def test_weights_from_outside_go_to_the_lane_that_is_followed():
    guard, w, closure = with_a_fallback_that_began_anew()
    with torch.no_grad():
        w.fill_(1.0)
    guard.step(closure)
    assert guard.last_decision.learned_loss == 1.0
    assert guard.last_decision.fallback_loss == pytest.approx((4 * 0.2**2) ** 2)


def test_after_loading_too():
    guard, _, _ = with_a_fallback_that_began_anew()
    w, closure = quadratic()
    resumed = BestOf(SGD([w], lr=0.4), Breaks([w], lr=0.1), nt=1)
    resumed.load_state_dict(guard.state_dict())
    with torch.no_grad():
        w.fill_(1.0)
    resumed.step(closure)
    assert resumed.last_decision.learned_loss == 1.0


@pytest.mark.parametrize(("kind", "nc"), [(BestOf, 0), (BestOf, 1), (LossGuard, 1)])
def test_statistics_that_a_bad_minibatch_spoils_are_not_kept(kind, nc):
    """Its step is skipped by the scaler, so that the parameters are fine and BatchNorm isn't."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    learned, fallback = (SGD(model.parameters(), lr=rate) for rate in (0.2, 0.02))
    guard = kind(learned, fallback, nt=2, nc=nc, model=model, scaler=GradScaler("cpu"))
    for call, (x, label) in enumerate(minibatches(4 * (2 + nc))):
        if call == 1:
            x[0, 0] = math.inf
        model.train(not guard.checking)

        def closure(batch=(x, label)):
            loss = loss_fn(model, batch)
            guard.scaler.scale(loss).backward()
            return loss

        guard.step(closure)
    assert guard.history[0].winner == -1
    assert all(decision.winner >= 0 for decision in guard.history[1:])
    assert model[1].running_var.isfinite().all() and model.mask.isinf().any()


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_lane_that_is_not_followed_goes_on_from_where_an_error_met_it(offload):
    """Parameters, statistics and optimizer alike; as if its minibatches had come one by one."""
    ends, batches = [], minibatches()

    def lost(_):
        raise KeyError("loss")

    for whole in (False, True):
        torch.manual_seed(0)
        model = mlp(nn.BatchNorm1d(16))
        behind, ahead = (Adam(model.parameters(), lr=rate) for rate in (1e-4, 0.05))
        guard = BestOf(behind, ahead, nt=4, model=model, offload=offload)
        guard.cycle(lambda batch, model=model: loss_fn(model, batch), batches[:4])
        assert guard.last_decision.winner == 1
        with pytest.raises(KeyError):
            if whole:
                part = [*batches[4:6], None, batches[7]]
                guard.cycle(lambda b, m=model: lost(b) if b is None else loss_fn(m, b), part)
            else:
                run(guard, model, batches[4:6])
                guard.step(lambda: lost(None))
        ends.append((guard._paths.all[0].copy, behind.state_dict(), model.state_dict()))
    assert_same_state(*ends)
    assert ends[0][0][-1] == 4 + 2  # minibatches that BatchNorm has tracked


@pytest.mark.parametrize("kind", [BestOf, LossGuard, ResidualGuard])
def test_under_autocast_around_the_step_the_model_is_at_x(kind):
    """Autocast keeps casts of weights, of whichever lane came last."""
    ends = []
    for around in (False, True):
        torch.manual_seed(0)
        model, (x, label) = mlp(), spiral(64)
        options = {"nc": 1} if kind is LossGuard else {}
        options |= {} if kind is ResidualGuard else {"model": model}
        learned, fallback = (SGD(model.parameters(), lr=rate) for rate in (0.01, 0.3))
        guard = kind(learned, fallback, nt=1, **options)

        def loss_of(model=model, x=x, label=label):
            return nn.functional.cross_entropy(model(x).float(), label)

        def closure(guard=guard, loss_of=loss_of, around=around):
            guard.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=True):
                loss = loss_of()
            loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for _ in range(6):
                guard.step(closure)
                if around:
                    seen = loss_of().item()
                    torch.clear_autocast_cache()
                    assert seen == loss_of().item()
        ends.append(model.state_dict())
    assert_same_state(*ends)


def test_where_all_learned_ones_have_stopped_nothing_is_checked():
    w, closure = quadratic()
    guard = BestOf(SGD([w], lr=0.0), SGD([w], lr=0.1), nt=2, nc=2, patience=1)
    for _ in range(4 + 2 * 2):
        guard.step(closure)
    assert [decision.forwards for decision in guard.history] == [4, 0, 0]
    guard.cycle(lambda _: w.square().sum(), [0, 0])
    assert len(guard.history) == 4


def test_one_that_has_stopped_stays_so_in_a_guard_without_patience():
    w, closure = quadratic()
    guard = BestOf(SGD([w], lr=0.0), SGD([w], lr=0.1), nt=1, patience=1)
    for _ in range(2):
        guard.step(closure)
    resumed = BestOf(SGD([w], lr=0.0), SGD([w], lr=0.1), nt=1)
    resumed.load_state_dict(guard.state_dict())
    resumed.step(closure)
    assert resumed.last_decision.learned_updates == 0
    assert resumed.records == [math.inf, guard.records[1] * 0.9 + resumed.last_decision.losses[0]]


def test_a_stream_that_ends_while_checking_is_told_as_it_is():
    w, closure = quadratic()
    guard = BestOf(SGD([w], lr=0.4), SGD([w], lr=0.1), nt=1, nc=1)
    guard.step(closure)
    with pytest.raises(StopIteration) as caught:
        guard.step(lambda: next(iter([])))
    assert not hasattr(caught.value, "__notes__")


def test_a_lane_that_begins_anew_remembers_nothing():
    """Though its own memory is finite."""
    w, _ = quadratic()
    learned = SGD([w], lr=0.01, momentum=0.9)
    guard = BestOf(learned, SGD([w], lr=0.1), nt=1, nc=1)

    def loss(_):
        return w.square().sum() * (math.nan if guard.checking and w.item() > 3.5 else 1)

    decision = guard.cycle(loss, [0], [0])
    assert decision.reset_learned and not decision.finite_learned
    assert not learned.state[w]


def test_d_is_the_mean_of_what_counts():
    w, _ = quadratic()
    guard = BestOf(SGD([w], lr=0.0), SGD([w], lr=0.0), nt=2)
    for factor in (1.0, math.nan):

        def closure(factor=factor):
            loss = w.square().sum()
            loss.backward()
            return loss * factor

        guard.step(closure)
    assert guard.records == [16.0, 16.0] and guard.last_decision.fallback_loss == 16.0


@pytest.mark.parametrize(("kind", "nc"), [(BestOf, 0), (LossGuard, 1)])
def test_a_lane_that_overflows_has_the_leaders_scale_in_the_next_cycle(kind, nc):
    """Else its scale, halved at each step that overflows, would go to 0 for ever."""
    w, _ = quadratic()
    guard = kind(SGD([w], lr=1e25), SGD([w], lr=1e-3), nt=2, nc=nc, scaler=GradScaler("cpu"))
    scales = []

    def closure():
        loss = w.pow(4).sum()  # far out its gradient overflows at any scale
        scales.append(guard.scaler.get_scale())
        guard.scaler.scale(loss).backward()
        return loss

    for _ in range(3):
        scales.clear()
        guard.step(closure)
        assert scales == [65536.0, 65536.0]
        for _ in range(1 + nc):
            guard.step(closure)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_an_error_while_checking_leaves_the_statistics(offload):
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(16))
    behind, ahead = (Adam(model.parameters(), lr=rate) for rate in (1e-4, 0.05))
    guard = BestOf(behind, ahead, nt=2, nc=1, model=model, offload=offload)
    batches = [spiral(64) for _ in range(6)]
    guard.cycle(lambda batch: loss_fn(model, batch), batches[:2], batches[2:3])
    assert guard.last_decision.winner == 1

    def loss(batch):
        value = loss_fn(model, batch)
        if guard.checking:
            raise KeyError
        return value

    with pytest.raises(KeyError):
        guard.cycle(loss, batches[3:5], batches[5:])
    assert guard._paths.all[0].copy[-1] == 2 + 2  # num_batches_tracked of the lane behind
