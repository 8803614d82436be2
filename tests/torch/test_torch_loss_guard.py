"""The guard takes Algorithm 2's decisions and keeps its iterates."""

import copy
import math

import pytest
import torch
from algorithm2 import algorithm2, follow
from models import assert_same_state, closure_for, loss_fn, mlp, quadratic, run, spiral
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

from lossguard.torch import LossGuard, backoff, mean_criterion, sequential_criterion, track_record
from lossguard.torch.placing import ByPointer, ByValue

# A learned optimizer that is sometimes better and sometimes worse than each fallback.
PAIRS = {
    "sgd": (lambda ps: SGD(ps, lr=3.0, momentum=0.5), lambda ps: SGD(ps, lr=0.3, momentum=0.9)),
    "adam": (lambda ps: Adam(ps, lr=0.1), lambda ps: Adam(ps, lr=0.01)),
    "mixed": (lambda ps: Adam(ps, lr=0.2), lambda ps: SGD(ps, lr=1.0)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("loser", ["keep", "rollback", "reset"])
@pytest.mark.parametrize("hedge", [False, True])
@pytest.mark.parametrize(("training", "nc"), [(0, 2), (1, 2), (2, 0)])
def test_is_algorithm_2(pair, loser, hedge, training, nc):
    learned, fallback = PAIRS[pair]
    nt, cycles = 3, 12 if nc else 30
    batches = [spiral(16) for _ in range((nt + nc) * cycles)]
    model = mlp()

    def schedule(optimizer):
        return LambdaLR(optimizer, lambda t: 1 / (1 + t / 10))

    expected = list(
        algorithm2(
            model, learned, fallback, batches, loss_fn,
            nt=nt, nc=nc, loser=loser, hedge=hedge, schedule=schedule, training=training,
        )
    )  # fmt: skip
    learned, fallback = learned(model.parameters()), fallback(model.parameters())
    criterion = mean_criterion(training=training)
    guard = LossGuard(
        learned, fallback, nt=nt, nc=nc, loser=loser, hedge=hedge, criterion=criterion,
        schedulers=[schedule(fallback)],
    )  # fmt: skip
    for decision, means, _ in follow(guard, model, batches, expected):
        assert (decision.learned_loss, decision.fallback_loss) == (means[0], min(means[1:]))
        assert decision.used_learned == [decision.winner == 0] * nt
    assert len(guard.history) == cycles
    several = len({decision.winner for decision in guard.history}) > 1
    assert several or (nc == 0 and pair == "mixed"), "every lane should win some"


def test_model_state_and_random_numbers_belong_to_a_branch():
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.2))
    nt, nc = 3, 2
    batches = [spiral(16) for _ in range((nt + nc) * 10)]
    learned, fallback = PAIRS["mixed"]
    torch.manual_seed(1)
    expected = list(algorithm2(model, learned, fallback, batches, loss_fn, nt=nt, nc=nc))
    guard = LossGuard(
        learned(model.parameters()), fallback(model.parameters()), nt=nt, nc=nc, model=model
    )
    torch.manual_seed(1)
    for i, batch in enumerate(batches):
        seed = int(torch.randint(1 << 30, ()))
        torch.manual_seed(seed)
        guard.step(closure_for(guard, model, batch))
        if guard._cycle.phase == 0:
            state, winner, *_ = expected[i // (nt + nc)]
            assert guard.last_decision.winner == winner
            assert_same_state(model.state_dict(), state)
    assert {decision.winner for decision in guard.history} == {0, 1}


def test_a_learned_optimizer_that_never_wins_leaves_no_trace():
    """The guarded run is the fallback's own run over the train minibatches, bit by bit."""
    nt, nc = 4, 3
    batches = [spiral(16) for _ in range((nt + nc) * 5)]
    model = mlp(nn.BatchNorm1d(16))
    alone = copy.deepcopy(model)
    optimizer = Adam(alone.parameters(), lr=0.01)
    for i, batch in enumerate(batches):
        if i % (nt + nc) < nt:
            optimizer.zero_grad()
            loss_fn(alone, batch).backward()
            optimizer.step()
    fallback = Adam(model.parameters(), lr=0.01)
    guard = LossGuard(
        SGD(model.parameters(), lr=1e3, maximize=True), fallback, nt=nt, nc=nc, model=model
    )
    for batch in batches:
        guard.step(closure_for(guard, model, batch))
    assert all(decision.winner == 1 for decision in guard.history)
    assert_same_state(model.state_dict(), alone.state_dict())
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        for key, value in fallback.state[p].items():
            assert torch.equal(value, optimizer.state[q][key])


def test_a_hedge_is_the_fallback_alone():
    """Its path is the fallback's own run, whatever the other lanes do."""
    nt, nc = 3, 2
    batches = [spiral(16) for _ in range((nt + nc) * 8)]
    model = mlp()
    alone = copy.deepcopy(model)
    optimizer = Adam(alone.parameters(), lr=0.01)
    guard = LossGuard(
        Adam(model.parameters(), lr=0.03),
        Adam(model.parameters(), lr=0.01),
        nt=nt,
        nc=nc,
        hedge=True,
    )
    for i, batch in enumerate(batches):
        guard.step(closure_for(guard, model, batch))
        if i % (nt + nc) < nt:
            optimizer.zero_grad()
            loss_fn(alone, batch).backward()
            optimizer.step()
    assert any(decision.winner == 0 for decision in guard.history)
    for p, q in zip(guard._lanes.all[2].copy, alone.parameters(), strict=True):
        assert torch.equal(p, q)


def test_analytic_quadratic():
    weight, closure = quadratic(4.0)
    guard = LossGuard(SGD([weight], lr=0.25), SGD([weight], lr=0.1), nt=2, nc=1)
    seen = [(guard.step(closure).item(), weight.item()) for _ in range(3)]
    # The fallback's losses, before its steps, are returned up to the first decision.
    assert [w for _, w in seen] == pytest.approx([4.0, 4.0, 1.0])
    assert [f for f, _ in seen] == pytest.approx([16.0, (0.8 * 4) ** 2, (0.64 * 4) ** 2])
    decision = guard.last_decision
    assert decision.losses == pytest.approx([16.0, 4.0])
    assert (decision.learned_loss, decision.fallback_loss) == pytest.approx((1.0, 0.64**2 * 16))
    spent = (decision.steps, decision.gradients, decision.forwards, decision.learned_updates)
    assert spent == (2, 4, 2, 2)


def test_ties_go_to_the_fallback():
    weight, closure = quadratic()
    guard = LossGuard(SGD([weight], lr=0.1), SGD([weight], lr=0.1), nt=1, nc=1)
    for _ in range(4):
        guard.step(closure)
    assert [decision.winner for decision in guard.history] == [1, 1]
    hedged = LossGuard(SGD([weight], lr=0.1), SGD([weight], lr=0.1), nt=1, nc=1, hedge=True)
    for _ in range(2):
        hedged.step(closure)
    assert hedged.last_decision.winner == 2


@pytest.mark.parametrize(
    ("learned_lr", "fallback_lr", "winner", "w"),
    [(math.nan, 0.25, 1, 2.0), (0.25, math.nan, 0, 2.0), (math.inf, math.nan, -1, 4.0)],
)
def test_what_is_not_finite_cannot_win(learned_lr, fallback_lr, winner, w):
    weight, closure = quadratic(4.0)
    learned, fallback = SGD([weight], lr=1.0), SGD([weight], lr=1.0)
    learned.param_groups[0]["lr"] = learned_lr
    fallback.param_groups[0]["lr"] = fallback_lr
    guard = LossGuard(learned, fallback, nt=1, nc=1)
    for _ in range(2):
        guard.step(closure)
    decision = guard.last_decision
    assert decision.winner == winner
    assert decision.finite_learned == (winner == 0)
    assert decision.finite_fallback == (winner == 1)
    assert weight.item() == pytest.approx(w)


class Poisoned(Adam):
    """Adam whose momentum turns NaN at its second step, after the parameters have moved."""

    steps = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.steps += 1
        if self.steps == 2:
            for state in self.state.values():
                state["exp_avg"].fill_(math.nan)
        return loss


@pytest.mark.parametrize("side", ["learned", "fallback"])
def test_a_state_that_is_not_finite_is_reset(side):
    weight, closure = quadratic(4.0)
    poisoned, other = Poisoned([weight], lr=0.1), SGD([weight], lr=0.01)
    pair = (poisoned, other) if side == "learned" else (other, poisoned)
    guard = LossGuard(*pair, nt=2, nc=1)
    for _ in range(3):
        guard.step(closure)
    decision = guard.last_decision
    assert (decision.reset_learned, decision.reset_fallback) == (
        side == "learned",
        side == "fallback",
    )
    assert len(poisoned.state) == 0
    for _ in range(3):
        guard.step(closure)
    assert not guard.last_decision.reset_learned and not guard.last_decision.reset_fallback
    assert math.isfinite(poisoned.state[weight]["exp_avg"].item())


OPTIONS = {
    "paper": {},
    "hedged": {"hedge": True},
    "sequential": {"criterion": sequential_criterion(confidence=0.8, first=2, most=7)},
    "backoff": {"hedge": "only", "probing": backoff(patience=1, most=1)},
    "by value": {"hedge": True, "offload": "cpu"},
    "record": {
        "hedge": track_record(decay=0.5), "probing": backoff(patience=2, most=1, start="reset"),
        "criterion": sequential_criterion(confidence=0.7, first=2, most=7),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_cycle_is_the_stream(name):
    def build(model):
        learned, fallback = (make(model.parameters()) for make in PAIRS["adam"])
        schedulers = [LambdaLR(o, lambda t: 1 / (1 + t / 9)) for o in (learned, fallback)]
        return LossGuard(
            learned, fallback, nt=3, nc=2, model=model, schedulers=schedulers, **OPTIONS[name]
        )

    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.3))
    twin = copy.deepcopy(model)
    guard, other = build(model), build(twin)
    taken = set()
    for cycle in range(8):
        batches = [spiral(8) for _ in range(10)]
        state, rest = torch.get_rng_state(), iter(batches)
        while len(guard.history) == cycle:
            guard.step(closure_for(guard, model, next(rest)))
        torch.set_rng_state(state)
        check = iter(batches[3:])
        decision = other.cycle(lambda b: loss_fn(twin, b), batches[:3], check)
        assert repr(decision) == repr(guard.last_decision)  # repr, since NaN != NaN
        assert_same_state(model.state_dict(), twin.state_dict())
        assert len(list(check)) == len(list(rest))  # both took the same minibatches
        taken.add(decision.forwards)
    assert len(taken) > 1 or name in ("paper", "by value")


@pytest.mark.parametrize("hedge", [False, True])
def test_by_pointer_is_by_value(hedge):
    batches = [spiral(8) for _ in range(25)]
    model = mlp(nn.BatchNorm1d(16))
    twin = copy.deepcopy(model)
    guards = []
    for m, offload in ((model, None), (twin, "cpu")):
        learned, fallback = (make(m.parameters()) for make in PAIRS["mixed"])
        guards.append(
            LossGuard(learned, fallback, nt=3, nc=2, hedge=hedge, model=m, offload=offload)
        )
        run(guards[-1], m, batches)
    assert [type(guard._cycle.placing) for guard in guards] == [ByPointer, ByValue]
    assert_same_state(model.state_dict(), twin.state_dict())
    assert guards[0].history == guards[1].history


@pytest.mark.parametrize("other", ["parameter", "frozen", "buffer"])
def test_parameters_that_share_a_storage_do_so_in_every_lane(other):
    def build():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        if other == "buffer":
            model.register_buffer("weight", model[0].weight.data)
        else:
            model[1].weight.data = model[0].weight.data
            model[1].weight.requires_grad_(other == "parameter")
        return model, [p for p in model.parameters() if p.requires_grad]

    batch, (alone, params), (model, ours) = spiral(8), build(), build()
    model.load_state_dict(alone.state_dict())
    optimizer = SGD(params, lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        loss_fn(alone, batch).backward()
        optimizer.step()
    guard = LossGuard(SGD(ours, lr=0.1), SGD(ours, lr=0.1), nt=2, nc=1, model=model)
    run(guard, model, [batch] * 9)
    assert_same_state(model.state_dict(), alone.state_dict())


def test_parameters_that_share_a_storage_stay_there():
    """The second half of one buffer is a view of it, which others may hold."""
    flat = torch.tensor([9.0, 4.0])
    weight = flat[1:].requires_grad_()
    guard = LossGuard(SGD([weight], lr=0.25), SGD([weight], lr=0.1), nt=1, nc=1)

    def closure():
        loss = flat.detach()[1] ** 2 + 0 * weight.square().sum()  # what the buffer holds
        (weight.square().sum()).backward()
        return loss

    for _ in range(2):
        guard.step(closure)
    assert guard.last_decision.learned_loss == pytest.approx(2.0**2)
    assert flat.tolist() == [9.0, 2.0]


def test_the_best_of_several_candidates():
    """SGD multiplies w by 1 - 2 lr: the candidates go to 3.2, 1.6 and 0, the fallback to 2.4."""
    weight, closure = quadratic(4.0)
    candidates = [SGD([weight], lr=lr) for lr in (0.1, 0.3, 0.5)]
    guard = LossGuard(candidates, SGD([weight], lr=0.2), nt=1, nc=1, hedge=True)
    for _ in range(2):
        guard.step(closure)
    decision = guard.last_decision
    assert (decision.winner, weight.item()) == (2, pytest.approx(0.0))
    assert (decision.learned_loss, decision.fallback_loss) == pytest.approx((0.0, 2.4**2))
    assert (decision.gradients, decision.forwards, decision.learned_updates) == (4, 4, 3)
    for _ in range(2):  # at the minimum all tie, and s, which isn't there, loses
        guard.step(closure)
    assert guard.last_decision.winner == 3


def test_backing_off_spends_nothing_on_the_learned_lane():
    weight, closure = quadratic(4.0)
    guard = LossGuard(
        SGD([weight], lr=1.5), SGD([weight], lr=0.25), nt=1, nc=2,
        probing=backoff(patience=2, most=2),
    )  # fmt: skip
    calls, seen = 0, []

    def counted():
        nonlocal calls
        calls += 1
        return closure()

    while len(guard.history) < 9:
        before = len(guard.history)
        guard.step(counted)
        if len(guard.history) > before:
            seen.append(calls)
            calls = 0
    assert seen == [6, 6, 1, 6, 1, 1, 6, 1, 1]  # 2 lanes of 3 minibatches, or one gradient
    assert weight.item() == pytest.approx(4.0 * 0.5**9)
    decision = guard.last_decision
    assert (decision.winner, decision.forwards, decision.learned_updates) == (1, 0, 0)
    assert math.isnan(decision.learned_loss) and math.isnan(decision.fallback_loss)


@pytest.mark.parametrize(("start", "expected"), [("keep", 3), ("reset", 1)])
def test_what_a_probe_starts_from(start, expected):
    weight, closure = quadratic(4.0)
    learned = Adam([weight], lr=10.0)
    guard = LossGuard(
        learned, SGD([weight], lr=0.25), nt=1, nc=1, probing=backoff(patience=2, start=start)
    )
    for _ in range(2 + 2 + 1 + 2):  # two probes, a wait of one cycle, a probe
        guard.step(closure)
    assert [decision.learned_updates for decision in guard.history] == [1, 1, 0, 1]
    assert learned.state[weight]["step"].item() == expected


def test_a_sequential_criterion_looks_until_it_is_settled():
    """Differences of 0 aren't settled before the last look; constant ones are at the first."""
    weight, closure = quadratic(4.0)
    learned, fallback = SGD([weight], lr=0.1), SGD([weight], lr=0.1)
    criterion = sequential_criterion(first=2, most=7)
    guard = LossGuard(learned, fallback, nt=1, nc=1, criterion=criterion)
    for lr, checks, winner in ((0.1, 7, 1), (0.2, 2, 0), (0.0, 2, 1)):
        learned.param_groups[0]["lr"] = lr
        for _ in range(1 + checks):
            guard.step(closure)
        assert (guard.last_decision.winner, guard.last_decision.forwards) == (winner, 2 * checks)
    assert len(guard.history) == 3
    learned.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError) as error:
        guard.cycle(lambda batch: weight.square().sum(), [0], range(5))
    assert str(error.value).startswith("check_batches must be at least 7 minibatches, got 5 (")
    assert guard.cycle(lambda batch: weight.square().sum(), [0], range(7)).winner == 1


def test_the_callback_sees_every_decision():
    weight, closure = quadratic()
    seen = []
    guard = LossGuard(
        SGD([weight], lr=0.1), SGD([weight], lr=0.2), nt=1, nc=1, callback=seen.append
    )
    for _ in range(6):
        guard.step(closure)
    assert seen == guard.history and len(seen) == 3


def test_an_exception_in_the_closure_leaves_the_kept_iterate():
    weight, closure = quadratic(4.0)
    guard = LossGuard(SGD([weight], lr=0.1), SGD([weight], lr=0.2), nt=2, nc=1)
    guard.step(closure)

    def broken():
        if weight.item() == pytest.approx(0.6 * 4):  # z, after y has been stepped
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        guard.step(broken)
    assert weight.item() == 4.0 and weight.grad is None
    for _ in range(3):
        guard.step(closure)
    assert weight.item() == pytest.approx(0.36 * 4)


def test_the_hedge_costs_nothing_on_its_own_path():
    weight, closure = quadratic(4.0)
    learned, fallback = SGD([weight], lr=0.2), SGD([weight], lr=0.1)
    guard = LossGuard(learned, fallback, nt=2, nc=1, hedge=True)
    spent = []
    for learned_lr in (0.0, 0.2, 0.0):  # loses, wins, loses
        learned.param_groups[0]["lr"] = learned_lr
        for _ in range(3):
            guard.step(closure)
        spent.append((guard.last_decision.winner, guard.last_decision.gradients))
    assert spent == [(2, 4), (0, 4), (1, 6)]
    assert [decision.forwards for decision in guard.history] == [2, 2, 3]


@pytest.mark.parametrize("hedge", [True, "only", track_record()])
def test_a_hedge_on_its_own_path_follows_what_is_loaded(hedge):
    """Weights loaded after the guard was built, and x after an error in the closure."""
    weight, closure = quadratic(4.0)
    guard = LossGuard(SGD([weight], lr=0.0), SGD([weight], lr=0.25), nt=2, nc=1, hedge=hedge)
    for start in (8.0, 16.0):
        with torch.no_grad():
            weight.fill_(start)
        guard.step(closure)
        with pytest.raises(KeyError):
            guard.step(lambda: {}["loss"])
        for _ in range(3):
            guard.step(closure)
        assert weight.item() == start / 4


def test_a_hedge_that_is_not_finite_begins_again():
    weight, closure = quadratic(4.0)
    learned, fallback = SGD([weight], lr=0.25), SGD([weight], lr=0.1, momentum=0.9)
    guard = LossGuard(learned, fallback, nt=1, nc=1, hedge=True)
    fallback.param_groups[0]["lr"] = math.nan
    for _ in range(2):
        guard.step(closure)
    assert (guard.last_decision.winner, guard.last_decision.reset_fallback) == (0, True)
    fallback.param_groups[0]["lr"], learned.param_groups[0]["lr"] = 0.1, 0.0
    for _ in range(2):
        guard.step(closure)
    assert guard.last_decision.winner == 2
    assert weight.item() == pytest.approx(0.8 * 2.0)  # one step of the fallback from x = 2


def test_every_candidate_begins_anew():
    """In the second of two probes, after a wait of one cycle."""
    w, closure = quadratic()
    several = [Adam([w], lr=10.0), Adam([w], lr=20.0)]
    probing = backoff(patience=2, start="reset")
    guard = LossGuard(several, SGD([w], lr=0.25), nt=1, nc=1, probing=probing)
    for _ in range(2 + 2 + 1 + 2):
        guard.step(closure)
    assert [one.state[w]["step"].item() for one in several] == [1, 1]
