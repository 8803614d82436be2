"""Optimizers on paths of their own: which one is followed, and that x is never behind the best."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from models import Diverges, assert_resumes, assert_same_state, loss_fn, mlp, quadratic, run, spiral
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

from lossguard.torch import BestOf, LossGuard, ResidualGuard

NT, CYCLES, DECAY = 3, 20, 0.7


def optimizers(params):
    """Of which none is the best all the time."""
    params = list(params)
    return [SGD(params, lr=0.5, momentum=0.9), Adam(params, lr=0.05)], AdamW(params, lr=0.005)


def build(model, **options):
    learned, fallback = optimizers(model.parameters())
    schedulers = [LambdaLR(learned[1], lambda t: 1 / (1 + t / 50))]
    options = {"decay": DECAY, "schedulers": schedulers, "model": model} | options
    return BestOf(learned, fallback, nt=NT, **options)


def minibatches(cycles=CYCLES):
    torch.manual_seed(3)
    return [spiral(16) for _ in range(cycles * NT)]


def alone(model, number, batches):
    """The optimizer of this number by itself: losses, and the state after each cycle."""
    learned, fallback = optimizers(model.parameters())
    optimizer = [*learned, fallback][number]
    schedule = LambdaLR(learned[1], lambda t: 1 / (1 + t / 50))
    losses, states = [], []
    for k, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        if number == 1:
            schedule.step()
        losses.append(loss.item())
        if k % NT == 0:
            states.append(copy.deepcopy(model.state_dict()))
    return losses, states


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_it_follows_the_lowest_record_and_disturbs_none(offload):
    """Bit by bit against each optimizer alone, by pointer and by value; BatchNorm included."""
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(16))
    runs = [alone(copy.deepcopy(model), number, minibatches()) for number in range(3)]
    guard, records, followed = build(model, offload=offload), np.zeros(3), []
    for cycle, batches in enumerate(zip(*[iter(minibatches())] * NT, strict=True)):
        run(guard, model, batches)
        part = slice(cycle * NT, (cycle + 1) * NT)
        records = DECAY * records + [np.mean(losses[part]) for losses, _ in runs]
        best = int(np.argmin(records))
        assert guard.last_decision.winner == best
        assert guard.last_decision.losses == pytest.approx(runs[best][0][part], rel=1e-6)
        assert_same_state(model.state_dict(), runs[best][1][cycle])
        followed.append(best)
    assert set(followed) == {0, 1, 2}


def test_with_checks_it_follows_the_lowest_record_on_held_out_minibatches():
    """Bit by bit against each optimizer alone; training losses would often choose another one."""
    torch.manual_seed(0)
    model, nc = mlp(nn.BatchNorm1d(16)), 2
    twins, train = [copy.deepcopy(model) for _ in range(3)], minibatches()
    runs = [alone(twin, number, train) for number, twin in enumerate(twins)]
    guard, records, on_training, followed = build(model, nc=nc), np.zeros(3), np.zeros(3), []
    for cycle, batches in enumerate(zip(*[iter(train)] * NT, strict=True)):
        part = slice(cycle * NT, (cycle + 1) * NT)
        held_out = [spiral(16) for _ in range(nc)]
        d = []
        for twin, (_, states) in zip(twins, runs, strict=True):
            twin.load_state_dict(states[cycle])
            with torch.no_grad():
                d.append(np.mean([loss_fn(twin, batch).item() for batch in held_out]))
        run(guard, model, batches)
        assert guard.checking
        run(guard, model, held_out)
        records = DECAY * records + d
        on_training = DECAY * on_training + [np.mean(losses[part]) for losses, _ in runs]
        best, decision = int(np.argmin(records)), guard.last_decision
        assert decision.winner == best and not guard.checking
        assert decision.losses == pytest.approx(runs[best][0][part], rel=1e-6)
        assert decision.fallback_loss == pytest.approx(d[2], rel=1e-6)
        assert decision.learned_loss == pytest.approx(min(d[:2]), rel=1e-6)
        assert (decision.gradients, decision.forwards) == (3 * NT, 3 * nc)
        assert guard.records == pytest.approx(list(records), rel=1e-6)
        assert_same_state(model.state_dict(), runs[best][1][cycle])
        followed.append((best, int(np.argmin(on_training))))
    assert len({best for best, _ in followed}) > 1
    assert any(best != by_training for best, by_training in followed)


def test_it_is_as_in_jax():
    """The same rule over the same losses, with optax's optimizers."""
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp
    import optax

    import lossguard

    targets = np.random.default_rng(0).normal(size=(CYCLES * NT, 4)).astype(np.float32)
    w = torch.full((4,), 3.0, requires_grad=True)
    ours = BestOf([SGD([w], lr=0.3), Adam([w], lr=0.2)], SGD([w], lr=0.05), nt=NT, decay=DECAY)

    def objective(params, i):
        return jnp.sum((params - jnp.asarray(targets)[i]) ** 2)

    members = [optax.sgd(0.3), optax.adam(0.2), optax.sgd(0.05)]
    theirs = lossguard.best_of([lossguard.unguarded(one, nt=NT) for one in members], decay=DECAY)
    state = theirs.init(jnp.full(4, 3.0))
    step = jax.jit(lambda state: theirs.step(state, objective))
    winners = set()
    for cycle in range(CYCLES):
        for target in torch.tensor(targets[cycle * NT : (cycle + 1) * NT]):

            def closure(target=target):
                loss = (w - target).square().sum()
                loss.backward()
                return loss

            ours.step(closure)
        state, decision = step(state)
        assert ours.last_decision.winner == int(decision.winner)
        np.testing.assert_allclose(w.detach().numpy(), state.params, rtol=1e-5, atol=1e-5)
        winners.add(int(decision.winner))
    assert len(winners) == 3


def test_losses_sum_up_to_no_more_than_the_fallbacks():
    """Discounted, after each cycle, beside optimizers that ascend, stand still and overflow."""
    torch.manual_seed(1)
    params = [w := torch.randn(5, requires_grad=True)]
    start = w.detach().clone()
    hostile = [SGD(params, lr=0.2, maximize=True), SGD(params, lr=0.0), Diverges(params, lr=0.3)]
    guard = BestOf([*hostile, Adam(params, lr=0.2)], SGD(params, lr=0.1), nt=NT, decay=DECAY)
    plain = start.clone().requires_grad_()
    optimizer = SGD([plain], lr=0.1)
    kept = own = 0.0
    for cycle in range(60):
        own *= DECAY
        for _ in range(NT):
            target = torch.randn(5)

            def closure(at=w, target=target):
                at.grad = None
                loss = (at - target).square().sum()
                loss.backward()
                return loss

            guard.step(closure)
            own += optimizer.step(lambda: closure(plain)).item() / NT
        kept = DECAY * kept + np.mean(guard.last_decision.losses)
        assert kept <= own * (1 + 1e-6), cycle
        assert w.isfinite().all()
    assert len({decision.winner for decision in guard.history}) > 1


@pytest.mark.parametrize("nc", [0, 2])
@pytest.mark.parametrize("done", range(3, 9))
def test_resumes_bit_by_bit_at_any_point_of_a_cycle(done, nc):
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.2))
    assert_resumes(partial(build, nc=nc), model, minibatches(6), done)


@pytest.mark.parametrize("nc", [0, 2])
def test_a_cycle_at_once_is_the_same(nc):
    """Dropout's random numbers included, which lanes share."""
    model = mlp(nn.Dropout(0.2))
    twin, batches = copy.deepcopy(model), minibatches()
    guard, other = build(model, nc=nc), build(twin, nc=nc)
    state = torch.get_rng_state()
    run(guard, model, batches)
    torch.set_rng_state(state)
    for part in zip(*[iter(batches)] * (NT + nc), strict=True):
        decision = other.cycle(lambda batch: loss_fn(twin, batch), part[:NT], part[NT:])
        assert decision is other.last_decision
    assert_same_state(twin.state_dict(), model.state_dict())
    assert other.history == guard.history
    other.step(closure := lambda: loss_fn(twin, batches[0]).backward() or 1.0)
    with pytest.raises(ValueError, match=r"^cycle must start where the last one ended, got one af"):
        other.cycle(closure, batches[:NT])
    with pytest.raises(ValueError, match=r"^train_batches must be 3 minibatches, got 2 "):
        guard.cycle(closure, batches[:2])
    if nc:
        with pytest.raises(ValueError, match=r"^check_batches must be at least 2 minibatches, got"):
            guard.cycle(closure, batches[:NT], batches[:1])


def test_who_is_away_for_long_stops():
    """x goes on as it would, at the cost of the fallback; also after it was saved and loaded."""
    torch.manual_seed(0)
    batches = minibatches()
    model = mlp()
    copies = [copy.deepcopy(model) for _ in range(2)]

    def guarded(model, **options):
        params = list(model.parameters())
        learned = [SGD(params, lr=0.0), SGD(params, lr=1e30), Adam(params, lr=0.02)]
        return BestOf(learned, AdamW(params, lr=0.001), nt=NT, decay=DECAY, **options)

    guard, plain = guarded(model, patience=4), guarded(copies[0])
    run(plain, copies[0], batches)
    run(guard, model, batches[: 10 * NT + 1])
    resumed = guarded(copies[1], patience=4)
    resumed.load_state_dict(guard.state_dict())
    run(resumed, copies[1], batches[10 * NT + 1 :])
    updates = [decision.learned_updates // NT for decision in resumed.history]
    assert updates == [3] * 4 + [1] * (CYCLES - 4)
    gradients = [decision.gradients // NT for decision in resumed.history]
    assert gradients == [ran + 1 for ran in updates]
    winners = [decision.winner for decision in resumed.history]
    assert winners == [decision.winner for decision in plain.history]
    assert set(winners) == {2, 3}
    assert_same_state(copies[1].state_dict(), copies[0].state_dict())


def test_if_all_learned_ones_have_stopped_the_fallback_goes_on():
    w, closure = quadratic()
    guard = BestOf(SGD([w], lr=0.0), SGD([w], lr=0.1), nt=1, patience=2)
    for _ in range(5):
        guard.step(closure)
    assert [decision.learned_updates for decision in guard.history] == [1, 1, 0, 0, 0]
    assert math.isnan(guard.last_decision.learned_loss) and guard.last_decision.finite_learned
    assert w.item() == pytest.approx(4 * 0.8**5)


def test_a_step_returns_the_loss_of_the_lane_that_was_followed_before_it():
    w, closure = quadratic()
    guard = BestOf(SGD([w], lr=0.4), SGD([w], lr=0.1), nt=2)
    losses = [guard.step(closure).item() for _ in range(3)]
    assert guard.history[0].winner == 0
    assert losses == pytest.approx([16.0, (4 * 0.8) ** 2, (4 * 0.2**2) ** 2])


def test_x_may_be_set_from_outside():
    """All lanes begin at it before the first cycle; later on the one that is followed."""
    w, closure = quadratic(9.0)
    guard = BestOf(SGD([w], lr=0.4), SGD([w], lr=0.1), nt=1)
    with torch.no_grad():
        w.fill_(4.0)
    losses = []
    for _ in range(2):
        losses.append(guard.step(closure).item())
    assert losses == pytest.approx([16.0, (4 * 0.8) ** 2])
    assert guard.last_decision.winner == 0 and w.item() == pytest.approx(4 * 0.2**2)
    with torch.no_grad():
        w.fill_(1.0)
    guard.step(closure)
    assert guard.last_decision.learned_loss == 1.0
    assert guard.last_decision.fallback_loss == pytest.approx((4 * 0.8**2) ** 2)


def test_schedule_free_goes_on_by_itself():
    """Bit by bit the one that is followed, at its averaged iterate."""
    package = pytest.importorskip("schedulefree")
    model, batches = mlp(), minibatches()
    rates, runs = (0.05, 0.005), []
    for rate in rates:
        alone = copy.deepcopy(model)
        optimizer, states = package.AdamWScheduleFree(alone.parameters(), lr=rate), []
        for part in zip(*[iter(batches)] * NT, strict=True):
            optimizer.train()
            for batch in part:
                optimizer.zero_grad()
                loss_fn(alone, batch).backward()
                optimizer.step()
            optimizer.eval()
            states.append(copy.deepcopy(alone.state_dict()))
        runs.append(states)
    guard = BestOf(*(package.AdamWScheduleFree(model.parameters(), lr=r) for r in rates), nt=NT)
    for cycle, part in enumerate(zip(*[iter(batches)] * NT, strict=True)):
        run(guard, model, part)
        assert_same_state(model.state_dict(), runs[guard.last_decision.winner][cycle])
    assert guard.last_decision.winner == 0


def test_every_lane_has_a_scaler():
    w, _ = quadratic()
    learned, fallback = SGD([w], lr=1e8), SGD([w], lr=0.1)
    guard = BestOf(learned, fallback, nt=3, scaler=GradScaler("cpu", init_scale=2.0**100))

    def closure():
        loss = w.square().sum()
        guard.scaler.scale(loss).backward()
        return loss

    for _ in range(3):
        guard.step(closure)
    assert [lane.scaler.get_scale() for lane in guard._paths.all] == [2.0**98, 2.0**100]
    assert guard.last_decision.winner == 1 and w.item() == pytest.approx(4 * 0.8**3)


@pytest.mark.parametrize("kind", [BestOf, LossGuard])
def test_a_model_that_has_got_buffers_is_refused(kind):
    model = nn.Sequential(nn.Linear(2, 2))
    guard = kind(Adam(model.parameters()), SGD(model.parameters()), nt=1, model=model)
    model.append(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"^model must have the buffers .*, got 3 more: build a"):
        guard.add_param_group({"params": model[1].parameters()})


def test_groups_can_be_added_between_cycles():
    first, second = nn.Linear(2, 8), nn.Linear(8, 2)
    model = nn.Sequential(first, nn.BatchNorm1d(8), second)
    guard = BestOf(Adam(first.parameters(), lr=0.1), SGD(first.parameters(), lr=0.1), nt=2,
                   model=model)  # fmt: skip
    run(guard, model, [spiral() for _ in range(2)])
    before = second.weight.detach().clone()
    guard.add_param_group({"params": second.parameters(), "lr": 0.02})
    run(guard, model, [spiral() for _ in range(6)])
    assert not torch.equal(second.weight, before)
    for lane in guard._paths.all:
        assert not torch.equal(lane.copy[2], before)


def test_a_closure_that_draws_its_own_minibatch_is_told():
    w, _ = quadratic()
    guard = BestOf(SGD([w], lr=0.1), SGD([w], lr=0.01), nt=1)
    drawn = iter(range(1, 9))

    def closure():
        loss = w.sum() * 0 + next(drawn)
        loss.backward()
        return loss

    with pytest.raises(RuntimeWarning, match=r"^closure gave different losses"):
        guard.step(closure)
    assert len(guard.history) == 1


def sgd(w):
    return SGD([w], lr=0.1)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda w: BestOf(sgd(w), sgd(w), decay=1), "decay must be above 0 and below 1, got 1"),
        (lambda w: BestOf(sgd(w), sgd(w), patience=0), "patience must be an integer of at least 1"),
        (lambda w: BestOf([], sgd(w)), "the number of learned optimizers must be an integer"),
        (lambda w: BestOf(sgd(w), sgd(w), nt=0), "nt must be an integer of at least 1, got 0"),
        (lambda w: BestOf(sgd(w), sgd(w), nc=-1), "nc must be an integer of at least 0, got -1"),
        (
            lambda w: BestOf(LossGuard(sgd(w), sgd(w)), sgd(w)),
            "learned must be no guard itself, got a LossGuard",
        ),
        (
            lambda w: LossGuard(sgd(w), BestOf(sgd(w), sgd(w))),
            "fallback must be no guard itself, got a BestOf",
        ),
        (
            lambda w: ResidualGuard(BestOf(sgd(w), sgd(w)), sgd(w)),
            "learned must be no guard itself, got a BestOf",
        ),
        (
            lambda w: LossGuard([sgd(w), ResidualGuard(sgd(w), sgd(w))], sgd(w)),
            "learned must be no guard itself, got a ResidualGuard",
        ),
        (
            lambda w: BestOf(sgd(w), sgd(w)).load_state_dict(
                LossGuard(sgd(w), sgd(w)).state_dict()
            ),
            "state_dict must be a BestOf's, got a LossGuard's",
        ),
        (
            lambda w: BestOf(sgd(w), sgd(w)).load_state_dict(
                BestOf([sgd(w), sgd(w)], sgd(w)).state_dict()
            ),
            "state_dict must be of 2 optimizers, got one of 3",
        ),
    ],
)
def test_errors(refused, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        refused(torch.ones(1, requires_grad=True))


def test_a_state_dict_from_within_a_cycle_of_another_course_is_refused():
    """With another patience other lanes would be in the rest of the cycle."""
    w, closure = quadratic()
    guard = BestOf(sgd(w), sgd(w), nt=3)
    guard.step(closure)
    for nt, nc, patience in ((2, 0, None), (3, 1, None), (3, 0, 1)):
        other = BestOf(sgd(w), sgd(w), nt=nt, nc=nc, patience=patience)
        message = f"must have nt={nt}, nc={nc}, patience={patience}, got nt=3, nc=0, patience=None$"
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(guard.state_dict())
    for _ in range(2):
        guard.step(closure)
    other.load_state_dict(guard.state_dict())


@pytest.mark.parametrize("kind", [BestOf, LossGuard])
def test_the_state_of_another_model_is_refused(kind):
    def guarded(*extra):
        model = mlp(*extra)
        return kind(Adam(model.parameters()), SGD(model.parameters()), model=model)

    with pytest.raises(ValueError, match="must be of 7 parameters and buffers, got one of 4"):
        guarded(nn.BatchNorm1d(16, affine=False)).load_state_dict(guarded().state_dict())
    w, v = (torch.ones(n, requires_grad=True) for n in (2, 3))
    other = kind(SGD([v]), Adam([v])).state_dict()
    with pytest.raises(
        ValueError, match=r"^state_dict must be of the same model, with a tensor of"
    ):
        kind(SGD([w]), Adam([w])).load_state_dict(other)
