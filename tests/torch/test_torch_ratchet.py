"""x goes back to its best when its losses since are higher than its own would have been."""

import math
from itertools import product

import pytest
import torch
from algorithm2 import algorithm2, follow
from models import assert_same_state, loss_fn, mlp, quadratic, run, spiral
from torch import nn
from torch.optim import SGD, Adam

from lossguard.torch import LossGuard, backoff, ratchet, track_record

NT, NC = 3, 2
NUMBERS = [-1.05, -1.0, 0.0, 0.5, 1.0, 1.05, 1.2, math.inf, math.nan]


@pytest.mark.parametrize(("kept", "held"), [*product(NUMBERS, NUMBERS)])
def test_the_rule_is_jaxs(kept, held):
    theirs = pytest.importorskip("lossguard.guards.ratchet")
    jnp = pytest.importorskip("jax.numpy")
    for cycles in (4, 5):
        start = theirs.init_ratchet(theirs.Branch(jnp.zeros(1), None), jnp.array(0.0))
        state = start._replace(cycles=jnp.int32(cycles), kept=jnp.array(kept), held=jnp.array(held))
        expected = theirs.ratchet(cycles=5, tolerance=0.1).compare(state)
        ours = ratchet(cycles=5, tolerance=0.1).compare(kept, held, cycles)
        assert ours == tuple(map(bool, expected))


@pytest.mark.parametrize(
    ("loser", "hedge"), [("keep", False), ("rollback", False), ("reset", True), ("keep", True)]
)
def test_is_its_definition(loser, hedge):
    """The reference has a model for b too, and nothing that is swapped."""
    batches = [spiral(16) for _ in range((NT + NC) * 120)]
    model = mlp(nn.BatchNorm1d(16))
    expected = list(
        algorithm2(
            model, lambda ps: Adam(ps, lr=0.05), lambda ps: Adam(ps, lr=0.02), batches, loss_fn,
            nt=NT, nc=NC, loser=loser, hedge=hedge, decay=0.9 if hedge else None, hold=(2, 0.01),
        )
    )  # fmt: skip
    learned, fallback = Adam(model.parameters(), lr=0.05), Adam(model.parameters(), lr=0.02)
    guard = LossGuard(
        learned, fallback, nt=NT, nc=NC, loser=loser, model=model,
        hedge=track_record(decay=0.9, share=0) if hedge else False,
        ratchet=ratchet(cycles=2, tolerance=0.01),
    )  # fmt: skip
    winners = [decision.winner for decision, *_ in follow(guard, model, batches, expected)]
    assert -1 in winners and len(winners) == 120


def climber(cycles, tolerance, **options):
    """Training losses are w, checks are for -w, and the learned optimizer climbs by 1 a step."""
    w = torch.zeros(1, requires_grad=True)
    guard = LossGuard(
        SGD([w], lr=1.0, maximize=True), SGD([w], lr=0.0), nt=1, nc=1,
        ratchet=ratchet(cycles=cycles, tolerance=tolerance), **options,
    )  # fmt: skip

    def cycle():
        return guard.cycle(lambda sign: sign * w.sum(), [1.0], [-1.0])

    return w, guard, cycle


def test_a_rise_that_no_check_sees():
    """b is at 0, so B is 0: three cycles' losses 0, 1, 2 are higher, and x goes back from 3."""
    w, guard, cycle = climber(3, 0.5)
    seen = []
    for _ in range(6):
        decision = cycle()
        seen.append((decision.winner, decision.used_learned, decision.forwards, w.item()))
    up = [(0, [True], 3, 1.0), (0, [True], 3, 2.0), (-1, [False], 3, 0.0)]
    assert seen == 2 * up
    assert [decision.losses for decision in guard.history] == 2 * [[0.0], [1.0], [2.0]]


def test_its_best_is_first_what_the_first_cycle_starts_from():
    """Weights that are loaded after the guard was built, and before or after its state is."""
    w, guard, cycle = climber(3, 0.1)
    with torch.no_grad():
        w.fill_(8.0)
    assert [cycle() and w.item() for _ in range(3)] == [9.0, 10.0, 8.0]
    fresh, other, other_cycle = climber(3, 0.1)
    other.load_state_dict(guard.state_dict())
    assert [other_cycle() and fresh.item() for _ in range(3)] == [9.0, 10.0, 8.0]


def test_b_sees_the_random_numbers_that_x_saw():
    """Where b is x their sums are the same, whatever is drawn."""
    w = torch.zeros(1, requires_grad=True)
    guard = LossGuard(SGD([w], lr=0.0), SGD([w], lr=0.0), nt=2, nc=1, ratchet=ratchet(cycles=5))
    guard.cycle(lambda _: (w + torch.rand(1)).sum(), range(2), range(1))
    best = guard._lanes.best
    assert best.kept == best.held > 0


def test_what_does_not_count():
    """A minibatch on which b's loss is not finite, and a cycle in which x stayed."""
    _, guard, _ = climber(3, 0.5)
    best = guard._lanes.best
    best.update([1.0, 5.0, math.inf], [2.0, math.nan, math.inf], False, False)
    best.update([], [1.0, 1.0, 1.0], False, False)
    assert (best.kept, best.held, best.cycles) == (1.0, 2.0, 2)


def test_the_learned_optimizer_begins_anew_when_it_runs_next():
    w = torch.zeros(1, requires_grad=True)
    learned = SGD([w], lr=1.0, momentum=0.5, maximize=True)
    guard = LossGuard(learned, SGD([w], lr=0.0), nt=1, nc=1, ratchet=ratchet(cycles=2))
    climbed = []
    for _ in range(4):
        start = w.item()
        guard.cycle(lambda sign: sign * w.sum(), [1.0], [-1.0])
        climbed.append(w.item() - start)
    assert climbed == [1.0, -1.0, 1.0, -1.0]  # with the momentum of before, 1.75 the third time


def test_b_goes_with_x_on_the_fallbacks_own_path():
    w = torch.ones(1, requires_grad=True)
    guard = LossGuard(
        SGD([w], lr=1.0, maximize=True),
        SGD([w], lr=0.1),
        nt=2,
        nc=1,
        hedge="only",
        ratchet=ratchet(cycles=1),
    )
    for k in range(1, 4):
        decision = guard.cycle(lambda batch: w.square().sum(), range(2), range(1))
        assert (decision.winner, decision.forwards) == (1, 2)
        assert w.item() == pytest.approx(0.8 ** (2 * k))


def test_in_the_cycle_in_which_x_leaves_b_is_still_x():
    w = torch.ones(1, requires_grad=True)
    guard = LossGuard(
        SGD([w], lr=0.3), SGD([w], lr=0.1), nt=2, nc=1, hedge=True, ratchet=ratchet(cycles=5)
    )
    decision = guard.cycle(lambda _: w.square().sum(), range(2), range(1))
    assert decision.winner == 0 and not guard._lanes.on_own
    best = guard._lanes.best
    assert (best.copy[0].item(), best.cycles) == (w.item(), 0)  # cycles from here on count


def test_only_the_loss_is_asked_for():
    """So closures that clip or unscale gradients can tell; and batch statistics stay."""
    model = mlp(nn.BatchNorm1d(16))
    guard = LossGuard(
        SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.2), nt=1, nc=1, model=model,
        ratchet=ratchet(),
    )  # fmt: skip
    seen = []

    def closure():
        seen.append((guard.checking, torch.is_grad_enabled()))
        loss = loss_fn(model, batch)
        loss.backward()
        return loss

    for _ in range(4):
        batch, before = spiral(), guard._weights.copy_buffers()
        guard.step(closure)
        if guard._cycle.phase:
            assert_same_state(guard._weights.copy_buffers(), before)
    assert seen == 2 * [*2 * [(False, True)], (True, False), *2 * [(True, False)]]


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_resumes_with_its_best(done, offload):
    def make():
        torch.manual_seed(0)
        model = mlp(nn.BatchNorm1d(16))
        learned, fallback = (Adam(model.parameters(), lr=lr) for lr in (0.05, 0.02))
        options = {"loser": "rollback", "probing": backoff(patience=2)}
        rule = ratchet(cycles=2, tolerance=0.0)
        return model, LossGuard(
            learned, fallback, nt=NT, nc=NC, model=model, ratchet=rule, offload=offload, **options
        )  # fmt: skip

    (model, guard), (other, resumed) = make(), make()
    batches, first = [spiral() for _ in range(100)], 35 + done
    run(guard, model, batches[:first])
    resumed.load_state_dict(guard.state_dict())
    for one, its_model in ((guard, model), (resumed, other)):
        run(one, its_model, batches[first:])
    assert -1 in [d.winner for d in guard.history[first // (NT + NC) :]]
    assert_same_state(resumed.state_dict(), guard.state_dict())


def test_a_new_parameter_group_is_bs_too():
    w, v = (torch.full((1,), value, requires_grad=True) for value in (0.0, 2.0))
    learned, fallback = SGD([w], lr=1.0, maximize=True), SGD([w], lr=0.0)
    guard = LossGuard(learned, fallback, nt=1, nc=1, ratchet=ratchet(cycles=3, tolerance=0.5))
    for k in range(3):
        if k == 1:
            guard.add_param_group({"params": [v]})
        guard.cycle(lambda sign: sign * (w + v).sum(), [1.0], [-1.0])
    assert (guard.last_decision.winner, w.item(), v.item()) == (-1, 0.0, 2.0)


def test_a_state_dict_without_a_best_is_refused():
    _, guard, _ = climber(3, 0.5)
    w = torch.zeros(1, requires_grad=True)
    plain = LossGuard(SGD([w], lr=1.0, maximize=True), SGD([w], lr=0.0), nt=1, nc=1)
    message = "^state_dict must be of a guard with a ratchet, got one of a guard without a ratchet$"
    with pytest.raises(ValueError, match=message):
        guard.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"without a ratchet, .* with a ratchet$"):
        plain.load_state_dict(guard.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cycles": 0}, "cycles must be an integer of at least 1, got 0"),
        ({"tolerance": -0.1}, "tolerance must be at least 0 and finite, got -0.1"),
        ({"tolerance": math.nan}, "tolerance must be at least 0 and finite, got nan"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ratchet(**arguments)


class Climbs(SGD):
    """Goes up."""

    def step(self, closure):
        loss = closure()
        for p in self.param_groups[0]["params"]:
            p.grad.neg_()
        super().step()
        return loss


def test_it_begins_anew_when_it_runs_next_though_it_waits():
    w, closure = quadratic(1.0)
    learned = Adam([w], lr=50.0)
    guard = LossGuard(
        learned, Climbs([w], lr=0.1), nt=1, nc=1,
        probing=backoff(patience=1, most=4), ratchet=ratchet(cycles=2, tolerance=0.0),
    )  # fmt: skip
    seen = []
    while len(guard.history) < 6:
        before = len(guard.history)
        guard.step(closure)
        if len(guard.history) > before:
            decision, steps = guard.last_decision, learned.state[w]["step"].item()
            seen.append((decision.winner, decision.learned_updates, steps))
    assert seen == [(1, 1, 1), (-1, 0, 1), (1, 1, 1), (-1, 0, 1), (1, 0, 1), (-1, 1, 1)]


def test_a_win_that_was_undone_is_one_for_probing():
    _, guard, cycle = climber(2, 0.5, probing=backoff(patience=1))
    for _ in range(4):
        cycle()
    assert [(d.winner, d.learned_updates) for d in guard.history] == 2 * [(0, 1), (-1, 1)]
