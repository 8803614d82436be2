"""s is given out while its recent training losses are lower, and in time x goes back there."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from algorithm2 import algorithm2, follow
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same_state, loss_fn, mlp, quadratic, spiral
from torch.optim import SGD, Adam

from lossguard.torch import LossGuard, backoff, ratchet, track_record
from lossguard.torch.track_record import Excess

loss = st.sampled_from([-3.0, -0.25, 0.5, 1.0, 2.0, math.inf, math.nan])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    total=st.sampled_from([-2.0, -0.5, 0.0, 1.0]),
    worst=st.sampled_from([0.0, 1.0, 4.0]),
    recent=st.sampled_from([-2.0, 0.0, 1.0]),
    cycles=st.sampled_from([0, 7, 15]),
    kept=st.lists(loss, min_size=3, max_size=3),
    own=st.lists(loss, min_size=3, max_size=3),
    on_own=st.booleans(),
)
def test_the_rule_is_jaxs(total, worst, recent, cycles, kept, own, on_own):
    theirs = pytest.importorskip("lossguard.guards.track_record")
    jnp = pytest.importorskip("jax.numpy")
    record = {"decay": 0.5, "share": 0.5}
    before = total, worst, recent, cycles
    now, back = track_record(**record).update(Excess(*before), kept, own, on_own)
    expected, goes_back = theirs.track_record(**record).update(
        theirs.Excess(*map(jnp.array, before)),
        jnp.array([*kept, math.nan]),
        jnp.array([*own, math.nan]),
        3,
        jnp.array(on_own),
    )
    assert back == bool(goes_back)
    assert now == pytest.approx([float(value) for value in expected], abs=0, rel=0, nan_ok=True)


@pytest.mark.parametrize("loser", ["keep", "rollback", "reset"])
def test_is_its_definition(loser):
    """The reference trains s to its own path in a model of its own, and sums up what it lost."""
    nt, nc, decay, share = 3, 2, 0.5, 0.9
    batches = [spiral(16) for _ in range((nt + nc) * 30)]
    model = mlp()
    expected = list(
        algorithm2(
            model, lambda ps: Adam(ps, lr=0.05), lambda ps: Adam(ps, lr=0.01), batches, loss_fn,
            nt=nt, nc=nc, loser=loser, hedge=True, decay=decay, share=share,
        )
    )  # fmt: skip
    learned, fallback = Adam(model.parameters(), lr=0.05), Adam(model.parameters(), lr=0.01)
    record = track_record(decay=decay, share=share)
    guard = LossGuard(learned, fallback, nt=nt, nc=nc, loser=loser, hedge=record)
    own = []
    for decision, means, excess in follow(guard, model, batches, expected):
        assert (decision.learned_loss, decision.fallback_loss) == tuple(means[:2])
        assert guard._lanes.excess == excess
        own.append(guard._lanes.on_own)
    winners = [decision.winner for decision in guard.history]
    assert set(winners) == {0, 1, 2}
    assert (False, True) in pairwise(own)  # x went back
    assert (2, False) in zip(winners, own, strict=True)  # s was given out while x went on


class Line:
    """F(w, i) = a_i w: SGD at the rate r takes w to w - r a_i, whatever w is.

    The learned optimizer's rate is 2 in the first cycle, then 0; the fallback's is 1. nt = nc = 1,
    and a check minibatch has the sign of the one before it, so rate 2 wins and rate 0 loses. After
    two cycles with a = 1 the fallback alone is at -2, and x, thanks to the first step, at -3. The
    record's decay is 1/2, so D is 0 and then -1, and W is 0.
    """

    def __init__(self, nt=1, **options):
        self.w = torch.zeros(1, requires_grad=True)
        self.learned = SGD([self.w], lr=2.0)
        self.guard = LossGuard(
            self.learned, SGD([self.w], lr=1.0), nt=nt, nc=1, hedge=track_record(decay=0.5),
            **options,
        )  # fmt: skip
        self.calls = 0

    def lead(self):
        """The first two cycles."""
        self.cycle(1.0)
        self.learned.param_groups[0]["lr"] = 0.0
        self.cycle(1.0)
        assert [decision.winner for decision in self.guard.history] == [0, 1]
        assert (self.w.item(), self.excess) == (-3.0, (-1.0, 0.0))
        return self

    def step(self, a, poison=None):
        def closure():
            self.calls += 1
            value = a * self.w.sum()
            value.backward()
            return value if poison is None else poison(self.guard.checking, self.w, value)

        return self.guard.step(closure)

    def cycle(self, a, poison=None):
        self.calls, before = 0, len(self.guard.history)
        self.step(a, poison)
        if len(self.guard.history) == before:
            self.step(math.copysign(1.0, a), poison)
        return self.guard.last_decision

    @property
    def excess(self):
        return self.guard._lanes.excess[:2]


def test_an_excursion():
    """Two bad cycles give s out, three bring x back, and s takes no check minibatches before."""
    line, seen = Line(), []
    line.cycle(1.0)
    spent = [line.calls]
    line.learned.param_groups[0]["lr"] = 0.0
    for a in (1.0, -0.25, -0.25, -0.25, 1.0):
        line.cycle(a)
        aside = line.guard._lanes.aside
        x = line.w.item() if aside is None else aside[0].item()
        seen.append((line.guard.last_decision.winner, line.excess, line.w.item(), x))
        spent.append(line.calls)
    # D and W: -1 and 0, then -1/2 + 1/4 (3 - 2) and 1/4, -1/8 + 1/4 and 1/4, 1/16 + 1/4 > 1/4
    assert seen == [
        (1, (-1.0, 0.0), -3.0, -3.0), (1, (-0.25, 0.25), -2.75, -2.75),
        (2, (0.125, 0.25), -1.5, -2.5), (2, (0.0, 0.0), -1.25, -1.25),
        (2, (0.0, 0.0), -2.25, -2.25),
    ]  # fmt: skip
    assert spent == [4, 5, 5, 5, 5, 4]
    history = line.guard.history
    assert [decision.gradients for decision in history] == [2, 3, 3, 3, 3, 2]
    assert [decision.forwards for decision in history] == [2] * 6
    losses = [decision.losses for decision in history]
    assert losses == [[0.0], [-2.0], [0.75], [0.4375], [0.375], [-1.25]]
    assert history[4].fallback_loss == 2.25  # z's, on which the check had decided


def test_one_bad_cycle_is_never_enough():
    """To bring x back; s is given out at once, for as long as it leads."""
    line = Line().lead()
    for a, excess in [(-64.0, (63.5, 64.0)), (0.25, (31.5, 32.0)), (0.25, (15.5, 16.0))]:
        assert line.cycle(a).winner == 2 and line.excess == excess
    assert line.w.item() == 61.5
    assert line.cycle(16.0).winner == 1 and line.excess == (-8.25, 8.0)
    assert line.w.item() == 44.5  # x has gone on
    assert line.guard._lanes.on_own is False


@pytest.mark.parametrize(
    ("a", "expected"), [(-0.5, (0, (-0.5, 0.0), 3.0)), (0.5, (2, (0.0, 0.0), 0.5))]
)
def test_a_learned_lane_leaves_only_with_training_losses_that_are_no_higher(a, expected):
    """Its check loss is lower both times; after the first step it is at 2, and s at 1."""
    line = Line(nt=2)
    for value in (-1.0, a, -1.0):
        line.step(value)
    decision = line.guard.last_decision
    assert decision.learned_loss < decision.fallback_loss
    assert (decision.winner, line.excess, line.w.item()) == expected


@pytest.mark.parametrize(
    ("a", "expected"),
    [(-0.25, (2, (0.0, 0.0), -1.25)), (0.25, (1, (-0.1875, 0.125), -2.75))],
)
def test_it_goes_back_in_a_cycle_without_learned_lanes(a, expected):
    line = Line(probing=backoff(patience=1, most=1)).lead()
    for _ in range(2):
        line.cycle(-0.25)
    decision = line.cycle(a)
    assert (decision.winner, line.excess, line.w.item()) == expected
    spent = (line.calls, decision.gradients, decision.forwards, decision.learned_updates)
    assert spent == (2, 2, 0, 0)


@pytest.mark.parametrize("done", [0, 1])
def test_resumes_in_the_middle_of_an_excursion(done):
    """s is given out; without W x would go back in the first of the two cycles, without D not."""
    line, resumed = Line().lead(), Line()
    line.cycle(-1.0)
    if done:
        line.step(-0.25)
    resumed.guard.load_state_dict(line.guard.state_dict())
    assert resumed.excess == (0.5, 1.0)
    for one in (line, resumed):
        if done:
            one.step(-1.0)
        else:
            one.cycle(-0.25)
        assert (one.excess, one.w.item()) == ((0.5, 0.5), -0.75)
        assert one.guard._lanes.aside[0].item() == -1.75
        one.cycle(-0.125)
        assert [decision.winner for decision in one.guard.history] == [0, 1, 2, 2, 2]
        assert one.guard._lanes.on_own
    assert_same_state(resumed.guard.state_dict(), line.guard.state_dict())


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
def test_a_kept_branch_whose_losses_are_not_finite_goes_back(bad):
    line = Line().lead()
    decision = line.cycle(
        1.0, lambda checking, w, value: bad if w.item() == -3.0 and not checking else value
    )
    assert (decision.winner, line.excess, line.w.item()) == (2, (0.0, 0.0), -3.0)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("both", [False, True])
def test_x_stays_where_the_losses_of_s_are_not_finite(bad, both):
    line = Line().lead()
    where = (-2.0, -3.0) if both else (-2.0,)
    decision = line.cycle(
        -1.0, lambda checking, w, value: bad if w.item() in where and not checking else value
    )
    assert (decision.winner, line.excess, line.w.item()) == (1, (-0.5, 0.0), -2.0)


def test_where_the_check_is_lost_on_all_the_lead_counts():
    """x stays at -3, compared by the training losses of z, till s at -5 has made up for it."""
    line, seen = Line().lead(), []
    for _ in range(4):
        decision = line.cycle(1.0, lambda checking, w, value: math.nan if checking else value)
        assert (decision.finite_learned, decision.finite_fallback) == (False, False)
        seen.append((decision.winner, line.excess, line.w.item()))
    assert seen == [
        (-1, (-1.5, 0.0), -3.0), (-1, (-0.75, 0.0), -3.0), (2, (0.625, 1.0), -5.0),
        (2, (0.0, 0.0), -6.0),
    ]  # fmt: skip


def test_an_s_that_is_not_finite_begins_again():
    """Even where x would have gone back: then D and W begin again too."""
    line = Line().lead()
    for _ in range(2):
        line.cycle(-0.25)

    def poison(checking, w, value):
        if w.item() == -1.5 and not checking:
            w.grad.fill_(math.nan)
        return value

    decision = line.cycle(-0.25, poison)
    assert (decision.winner, decision.reset_fallback) == (1, True)
    assert (line.excess, line.w.item()) == ((0.0, 0.0), -2.25)
    assert line.cycle(1.0).winner == 2 and line.calls == 4  # z is s again
    assert line.w.item() == -3.25


def test_where_x_stays_its_losses_are_those_from_x():
    w = torch.zeros(1, requires_grad=True)
    guard = LossGuard(SGD([w], lr=2.0), SGD([w], lr=1.0), nt=1, nc=1, hedge=track_record())
    guard.cycle(lambda scale: scale * w.sum(), [1.0], [1.0])
    decision = guard.cycle(lambda scale: scale * w.sum(), [1.0], [math.nan])
    assert (decision.winner, decision.losses) == (-1, [-2.0])


def test_on_its_own_path_too_a_fallback_whose_check_is_not_finite_is_not_kept():
    w, _ = quadratic(1.0)
    learned, fallback = SGD([w], lr=0.1, maximize=True), SGD([w], lr=0.1)
    guard = LossGuard(learned, fallback, nt=2, nc=2, hedge=track_record())

    def loss(_):
        return w.square().sum() * (math.nan if guard.checking and w.item() < 1 else 1)

    decision = guard.cycle(loss, range(2), range(2))
    assert not decision.finite_fallback and decision.winner == 0


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("loser", ["keep", "reset"])
def test_losses_sum_up_to_no_more_than_the_fallbacks(rate, loser):
    """theory.md, section 5: at any time, beside one that wins at times."""
    nt, nc, cycles = 3, 1, 60
    batches = [[spiral(16) for _ in range(nt + nc)] for _ in range(cycles)]
    model = mlp()
    single = copy.deepcopy(model)
    alone = Adam(single.parameters(), lr=0.002)
    guard = LossGuard(
        Adam(model.parameters(), lr=rate), Adam(model.parameters(), lr=0.002), nt=nt, nc=nc,
        loser=loser, hedge=track_record(decay=0.7), ratchet=ratchet(cycles=5, tolerance=0.0),
    )  # fmt: skip
    regret, beside = 0.0, 0
    for batch in batches:
        losses = []
        for train in batch[:nt]:
            alone.zero_grad()
            loss = loss_fn(single, train)
            loss.backward()
            alone.step()
            losses.append(loss.item())
        decision = guard.cycle(lambda b: loss_fn(model, b), batch[:nt], batch[nt:])
        regret += sum(decision.losses) - sum(losses)
        assert regret <= 1e-4
        beside += guard._lanes.aside is not None
    assert beside  # s was given out while x went on


def aside():
    """s at -1.5 is in the model, and x at -2.5 is not."""
    line = Line().lead()
    for _ in range(2):
        line.cycle(-0.25)
    assert (line.w.item(), line.guard._lanes.aside[0].item()) == (-1.5, -2.5)
    return line


def lost(checking, w, value):
    """Its check is lost on all lanes."""
    return math.nan if checking else value


def test_the_loss_returned_is_of_what_the_model_had():
    """Of s for a train minibatch; of z for a check, which s doesn't take; then of x again."""
    line = aside()
    assert line.step(-0.0625).item() == -0.0625 * -1.5
    assert line.step(-1.0).item() == -1.0 * (-2.5 + 0.0625)
    line = aside()
    assert line.cycle(0.25, lost).winner == -1 and line.w.item() == -2.5
    assert line.step(1.0).item() == -2.5


def test_x_that_stays_is_the_one_beside_s():
    line = aside()
    decision = line.cycle(0.25, lost)  # x leads again, and no lane is kept
    assert (decision.winner, line.w.item(), line.guard._lanes.aside) == (-1, -2.5, None)


def test_a_learned_step_that_is_not_given_out_is_not_told():
    line = Line().lead()
    line.cycle(-64.0)
    line.learned.param_groups[0]["lr"] = 2.0
    decision = line.cycle(0.25)
    assert (decision.winner, decision.used_learned, line.w.item()) == (2, [False], 61.75)
    assert line.guard._lanes.aside[0].item() == 60.5  # 61, and a step of the learned one


@pytest.mark.parametrize("where", ["hold", "give_out"])
def test_s_outlives_a_decision_that_is_interrupted_while_x_is_aside(where, monkeypatch):
    """Of a cycle in which x would have gone back: s is at -1.25 by then, and x as well."""
    line = aside()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"lossguard.torch.lanes.Lanes.{where}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            line.cycle(-0.25)
    decision = line.cycle(1.0)
    assert (decision.winner, decision.losses, line.w.item()) == (2, [-1.25], -2.25)


def test_parameters_are_added_to_x_beside_s_too():
    line = aside()
    v = torch.full((2,), 5.0, requires_grad=True)
    line.guard.add_param_group({"params": [v]})
    assert [t.tolist() for t in line.guard._lanes.aside] == [[-2.5], [5.0, 5.0]]


def test_a_state_takes_the_place_of_an_x_beside_s():
    line, other = aside(), Line().lead()
    line.guard.load_state_dict(other.guard.state_dict())
    assert line.w.item() == -3.0 and line.guard._lanes.aside is None
    line.guard.load_state_dict(aside().guard.state_dict())
    for one in (line, other):
        one.cycle(1.0)
    assert (line.w.item(), other.w.item()) == (-3.5, -4.0)


def test_where_s_breaks_while_it_leads_x_is_given_out():
    line = aside()

    def poison(checking, w, value):
        if w.item() == -1.5 and not checking:
            w.grad.fill_(math.nan)
        return value

    decision = line.cycle(-0.0625, poison)
    assert (decision.winner, decision.reset_fallback, line.w.item()) == (1, True, -2.4375)
    assert line.guard._lanes.aside is None and line.guard._lanes.on_own
