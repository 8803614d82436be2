"""What a closure may do, what is refused, and what becomes of the model when it fails."""

import copy
import math
import signal
import sys
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from models import (
    KINDS,
    TWO,
    Breaks,
    assert_same_state,
    closure_for,
    loss_fn,
    minibatches,
    mlp,
    quadratic,
    run,
    spiral,
    two,
)
from torch import nn
from torch.optim import SGD, Adam

from lossguard.torch import BestOf, Hedged, LossGuard, Recommended, ResidualGuard


def normed():
    return mlp(nn.BatchNorm1d(16), nn.Dropout(0.2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_leaves_the_model_as_it_was(kind, fails_at):
    """In the first lane that runs, and in the live one, which runs last."""
    model = normed()
    guard = two(kind, model, nt=4)
    run(guard, model, minibatches(2))
    before, draws, calls = copy.deepcopy(model.state_dict()), torch.get_rng_state(), 0

    def fails():
        nonlocal calls
        calls += 1
        loss = closure_for(guard, model, spiral())()
        if calls == fails_at:
            raise KeyError("mine")
        return loss

    batch = spiral()
    with pytest.raises(KeyError, match="mine"):
        guard.step(fails)
    assert_same_state(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    if fails_at == 1 or kind is ResidualGuard:
        assert guard.phase == 2
    torch.set_rng_state(draws)
    guard.step(closure_for(guard, model, batch))
    run(guard, model, minibatches(20))
    assert guard.history


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["learned", "fallback"])
def test_an_error_of_an_optimizer_leaves_the_model_as_it_was(kind, of):
    """Its buffers too, which the forward pass has changed."""

    class Raises(SGD):
        def step(self, closure=None):
            if bad:
                raise KeyError("mine")
            return super().step(closure)

    model, bad = normed(), False
    guard = two(kind, model, **{of: lambda ps: Raises(ps, lr=0.1)}, nt=4)
    run(guard, model, minibatches(2))
    before, bad = copy.deepcopy(model.state_dict()), True
    with pytest.raises(KeyError, match="mine"):
        run(guard, model, minibatches(20))
    assert_same_state(model.state_dict(), before)
    bad = False
    run(guard, model, minibatches(20))
    assert guard.history


@pytest.mark.parametrize("kind", TWO)
def test_a_failed_first_lane_changes_nothing_at_all(kind):
    models = [normed() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    guards = [two(kind, model, nt=4) for model in models]

    def fails():
        loss_fn(models[0], spiral())
        raise KeyError

    for k, batch in enumerate(minibatches(20)):
        torch.manual_seed(k)
        if k % 3 == 0:
            with pytest.raises(KeyError):
                guards[0].step(fails)
        for guard, model in zip(guards, models, strict=True):
            torch.manual_seed(k)
            guard.step(closure_for(guard, model, batch))
    assert_same_state(guards[0].state_dict(), guards[1].state_dict())


@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("at", [0, 1])
def test_a_body_that_is_left_counts_as_an_error(kind, at):
    model = normed()
    guard = two(kind, model, nt=4)
    run(guard, model, minibatches(1))
    before = copy.deepcopy(model.state_dict())
    told = r"were left before their last lane had stepped: such minibatches don't count"
    for twice in (False, True):
        with pytest.warns(RuntimeWarning, match=told) if at and twice else nullcontext():
            for k, lane in enumerate(guard.lanes()):
                loss = loss_fn(model, spiral())
                loss.backward()
                if k == at:
                    break
                lane.step(loss)
        assert_same_state(model.state_dict(), before)
    run(guard, model, minibatches(1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^rates must be set between minibatches, got another"):
        for lane in guard.lanes():
            loss = loss_fn(model, spiral())
            loss.backward()
            lane.step(loss)
            guard.param_groups[0]["lr"] *= 0.5
    guard.param_groups[0]["lr"] *= 2
    assert_same_state(model.state_dict(), before)
    for other in [inner.optimizer for inner in guard._inners.values()]:
        with pytest.raises(ValueError, match=r"^lane.step\(loss\) must make every step while"):
            for lane in guard.lanes():
                loss = loss_fn(model, spiral())
                loss.backward()
                other.step()
                lane.step(loss)
        assert_same_state(model.state_dict(), before)
    with pytest.raises(ValueError, match=r"^the body of guard.lanes\(\) must call lane.step\(loss"):
        for _ in guard.lanes():
            pass
    assert_same_state(model.state_dict(), before)
    with pytest.raises(
        ValueError, match=r"^lane.step must be called once for each lane, got again"
    ):
        for lane in guard.lanes():
            loss = loss_fn(model, spiral())
            loss.backward()
            lane.step(loss)
            lane.step(loss)
    run(guard, model, minibatches(20))


@pytest.mark.usefixtures("as_ctrl_c")
@pytest.mark.parametrize("body", [False, True])
def test_a_second_ctrl_c_comes_at_once(body):
    model, reached = mlp(), []
    guard = two(Recommended, model, nt=2)
    run(guard, model, minibatches(3))
    before = copy.deepcopy(model.state_dict())

    def twice():
        for _ in range(2):
            reached.append(1)
            signal.raise_signal(signal.SIGINT)
        reached.append("not here")

    with pytest.raises(KeyboardInterrupt):
        if body:
            for _ in guard.lanes():
                twice()
        else:
            guard.step(twice)
    assert reached == [1, 1]
    assert_same_state(model.state_dict(), before)
    run(guard, model, minibatches(3))


@pytest.mark.usefixtures("as_ctrl_c")
@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {"nt": 2}) for kind in KINDS), (LossGuard, {"nt": 1, "nc": 2})]
)
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_model_before_or_after_a_call(kind, options, which):
    """At lines of the package that a call runs, by a real signal; the last one checks only.

    But for ``LossGuard`` the call ends a cycle: after it the decision is there as well.
    """
    model = mlp(nn.BatchNorm1d(16))
    guard = two(kind, model, **options)
    batches = minibatches(4)
    run(guard, model, batches[:1])
    start, seen = guard.state_dict(), []

    def go(stop_at):
        """One call, with Ctrl-C at a line; how many lines were run, and where the model is."""
        guard.load_state_dict(start)
        lines, interrupted = 0, False

        def trace(frame, event, arg):
            nonlocal lines
            if "lossguard" not in frame.f_code.co_filename:
                return None
            if event == "line":
                lines += 1
                if lines == stop_at:
                    signal.raise_signal(which)
            return trace

        closure = closure_for(guard, model, batches[1])
        sys.settrace(trace)
        try:
            guard.step(closure)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        return lines, interrupted, copy.deepcopy(model.state_dict())

    before = copy.deepcopy(model.state_dict())
    total, _, after = go(None)
    decided = len(guard.history)
    assert decided == (kind is not LossGuard)
    for line in range(1, total, max(1, total // 40)):
        _, interrupted, now = go(line)
        assert interrupted
        is_before = all(torch.equal(now[k], before[k]) for k in now)
        if not is_before:
            assert_same_state(now, after)
        assert guard.steps == (0 if is_before else 2 * decided)
        seen.append(is_before)
        assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
        probe = torch.ones(2, requires_grad=True)
        probe.sum().backward()  # does nothing while a check's mode is on
        assert probe.grad is not None
        assert signal.getsignal(which) is signal.default_int_handler
    assert set(seen) == ({True} if "nc" in options else {True, False})
    run(guard, model, batches)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_without_backward(kind):
    model = mlp()
    guard = two(kind, model, nt=2)
    with pytest.raises(
        ValueError, match=r"^backward must be called in each body or closure, got no gradients$"
    ):
        guard.step(lambda: loss_fn(model, spiral()))
    run(guard, model, minibatches(3))
    guard.step(lambda: loss_fn(model, spiral()) * math.nan)  # it may leave it out here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [None, 3, torch.ones(2)])
def test_what_is_no_closure_or_no_loss(kind, wrong):
    model = mlp()
    guard = two(kind, model)
    if not isinstance(wrong, torch.Tensor):
        with pytest.raises(ValueError, match=r"^closure must be a function that returns the loss"):
            guard.step(wrong)

    def closure():
        loss_fn(model, spiral()).backward()
        return wrong

    if wrong != 3 if not isinstance(wrong, torch.Tensor) else True:
        with pytest.raises(ValueError, match=r"^closure must return the loss, one number, got"):
            guard.step(closure)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_from_before_are_refused(kind):
    model = mlp()
    guard = two(kind, model)
    loss_fn(model, spiral()).backward()
    with pytest.raises(
        ValueError, match=r"^gradients must be computed inside the closure, got some"
    ):
        guard.step(closure_for(guard, model, spiral()))


@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("where", ["in the closure", "prefetched"])
def test_a_minibatch_drawn_in_the_closure_is_told_at_once(kind, where):
    model, stream = mlp(), iter(minibatches(60))
    guard = two(kind, model)
    held = [next(stream)]

    def closure():
        batch = next(stream)
        if where == "prefetched":
            held.append(batch)
            batch = held.pop(0)
        loss = loss_fn(model, batch)
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match="closure gave different losses at the same parameters"):
        guard.step(closure)
    guard.step(closure)  # and only once


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [float, np.float64])
def test_a_loss_may_be_a_number(kind, number):
    weight, plain = quadratic()
    optimizers = SGD([weight], lr=0.4), SGD([weight], lr=0.1)
    guard = BestOf(optimizers, model=None) if kind is BestOf else kind(*optimizers, model=None)
    assert guard.step(lambda: number(plain().item())) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_may_write_all_losses_to_one_tensor(kind):
    models = [mlp() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    written = torch.zeros(())
    for k, model in enumerate(models):
        guard = two(kind, model, nt=3)
        for batch in minibatches(20):
            plain = closure_for(guard, model, batch)
            guard.step((lambda plain=plain: written.copy_(plain().detach())) if k else plain)
    assert_same_state(models[1].state_dict(), models[0].state_dict())


def test_errors_in_a_check_tell_of_it():
    model = mlp()
    guard = two(LossGuard, model, nt=1, nc=1)
    run(guard, model, minibatches(1))

    def closure():
        loss = loss_fn(model, spiral())
        torch.autograd.grad(loss, list(model.parameters()))
        return loss

    with pytest.raises(RuntimeError, match="does not require grad") as error:
        guard.step(closure)
    assert "the guard only checks here" in error.value.__notes__[0]


@pytest.mark.parametrize("kind", TWO)
def test_an_optimizer_may_not_switch_gradients_off(kind):
    class Freezes(SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for p in self.param_groups[0]["params"]:
                p.requires_grad_(False)
            return loss

    model = mlp()
    guard = two(kind, model, lambda ps: Freezes(ps, lr=0.1), nt=2)
    run(guard, model, minibatches(12))
    assert all(p.requires_grad for p in model.parameters())


class Master(SGD):
    """SGD on weights of its own, in float32, which it copies into the parameters."""

    def step(self, closure=None):
        loss = closure() if closure else None
        self.known = [(p, p.detach()) for p in self.param_groups[0]["params"]]  # no copies
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                master = self.state[p].setdefault("master", p.detach().float().clone())
                master.sub_(p.grad.float(), alpha=self.param_groups[0]["lr"])
                p.copy_(master)
        return loss


class Eager(Master):
    """The same, which copies the parameters when it is built."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for p in self.param_groups[0]["params"]:
            self.state[p]["master"] = p.detach().float().clone()


FORGETS = (BestOf, (0.05, 0.3))
"""The second one is ruined, and begins again."""


@pytest.mark.parametrize(("kind", "rates"), [*((kind, (0.7, 0.2)) for kind in KINDS), FORGETS])
def test_master_weights_go_with_their_lane(kind, rates):
    """Else the next step would undo what the guard has copied into the parameters."""
    ends = []
    pairs = ((SGD, SGD), (Master, SGD), (SGD, Master), (Eager, SGD), (SGD, Eager))
    for learned, fallback in pairs:
        torch.manual_seed(0)
        model = mlp()
        makers = (partial(made, lr=lr) for made, lr in zip((learned, fallback), rates, strict=True))
        guard = two(kind, model, *makers, nt=2)
        run(guard, model, minibatches(200 if rates == FORGETS[1] else 60))
        ends.append((model.state_dict(), repr(guard.history)))
        masters = [inner.copies == {"master"} for inner in guard._inners.values()]
        assert masters == [fallback is not SGD, learned is not SGD]
    for end in ends[1:]:
        assert_same_state(end, ends[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["learned", "fallback"])
def test_copies_of_the_parameters_that_lanes_would_share_are_refused(kind, side):
    class Elsewhere(SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr)
            self.anchors = [p.detach().clone() for p in params]  # that stay are no such copies
            self.masters = [[p.detach().double() for p in params]]

        def step(self, closure=None):
            with torch.no_grad():
                for p, master in zip(self.param_groups[0]["params"], *self.masters, strict=True):
                    master.sub_(p.grad, alpha=self.param_groups[0]["lr"])
                    p.copy_(master)

    model = mlp()
    guard = two(kind, model, **{side: lambda ps: Elsewhere(ps, lr=0.1)}, nt=2)
    message = "optimizer's state, where each lane has its own, got Elsewhere with some in masters"
    with pytest.raises(ValueError, match=message):
        run(guard, model, minibatches(2))


@pytest.mark.parametrize("kind", KINDS)
def test_master_weights_of_narrow_parameters_go_with_their_lane(kind):
    model = mlp().bfloat16()
    guard = two(kind, model, lambda ps: Master(ps, lr=0.1), nt=2)
    run(guard, model, [(x.bfloat16(), labels) for x, labels in minibatches(3)])
    assert [*guard._inners.values()][1].copies == {"master"}


@pytest.mark.parametrize("kind", TWO)
def test_edits_of_the_model_between_calls_are_gone_on_from(kind):
    """An exponential average that is swapped in, a projection: the model is the live lane."""
    model = mlp()
    guard = two(kind, model, nt=2)
    run(guard, model, minibatches(5))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loss = guard.step(closure_for(guard, model, spiral()))
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", [*TWO, ResidualGuard])
def test_a_learned_lane_that_raises_for_its_numbers_does_not_stop_the_fallback(kind):
    class Strict(nn.Module):
        """Raises where its input isn't finite, as distributions and decompositions do."""

        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            x = self.net(x)
            if not x.isfinite().all():
                raise ValueError("not finite")
            return x

    model = Strict()
    guard = two(kind, model, lambda ps: Breaks(ps, lr=0.1), lambda ps: SGD(ps, lr=0.1), nt=4)
    with pytest.warns(RuntimeWarning, match=r"numbers that aren't finite and raised ValueError"):
        run(guard, model, minibatches(40))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not guard.history[0].finite_learned or kind is BestOf
    with pytest.raises(KeyError):  # other errors are passed on
        guard.step(lambda: {}["loss"])


def test_a_fallback_that_raises_is_not_left():
    model = mlp()
    guard = two(Recommended, model, fallback=lambda ps: Breaks(ps, lr=0.1), nt=4)

    def closure(batch):
        guard.zero_grad()
        loss = loss_fn(model, batch)
        if not loss.isfinite():
            raise ValueError("mine")
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="mine"):
        for batch in minibatches(4):
            guard.step(lambda batch=batch: closure(batch))
    assert all(p.isfinite().all() for p in model.parameters())  # back where the cycle began


def test_errors_of_arguments():
    w, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    half = torch.ones(1, dtype=torch.float16, requires_grad=True)
    one = SGD([w], lr=0.1)
    shared = Adam([w], lr=0.1)
    shared.param_groups = one.param_groups
    around = SGD([w], lr=0.1)
    around.fast = Adam([w], lr=0.1)  # as Lookahead and ZeroRedundancyOptimizer have one
    model = mlp()
    cases = [
        (lambda: Recommended(one, one, model=None), "fallback, learned must be different optimiz"),
        (lambda: Recommended(shared, one, model=None), "learned must have parameter groups of its"),
        (
            lambda: Recommended(around, one, model=None),
            "learned must keep all that it remembers in its state, got SGD around Adam",
        ),
        (lambda: Recommended(SGD([v]), one, model=None), "learned must have the parameters of fal"),
        (
            lambda: Recommended(3, one, model=None),
            "learned must be a torch.optim.Optimizer and no ",
        ),
        (lambda: Hedged(SGD([w]), SGD([w], maximize=True), model=None), "fallback must minimize t"),
        (lambda: Hedged(SGD([w]), one, model=model), "model must be an nn.Module that holds param"),
        (lambda: Hedged(SGD([w]), one, model=3), "model must be an nn.Module that holds parameter"),
        (lambda: Hedged(SGD([w]), one, model=None, nt=0), "nt must be an integer of at least 1, g"),
        (lambda: Hedged(SGD([w]), one, model=None, share=1.0), "share must be at least 0 and belo"),
        (lambda: LossGuard(SGD([w]), one, model=None, nc=0), "nc must be an integer of at least 1"),
        (
            lambda: LossGuard(SGD([half]), SGD([half]), model=None),
            "parameters must have more range than float16 for LossGuard, where a gradient that ove",
        ),
        (
            lambda: ResidualGuard(SGD([half]), SGD([half]), model=None),
            "parameters must have more range than float16 for ResidualGuard, where a gradient that",
        ),
        (lambda: LossGuard(SGD([w]), one, model=None, loser="x"), "loser must be one of keep, res"),
        (lambda: BestOf([], model=None), "optimizers must be a list of at least one, got"),
        (lambda: BestOf(one, model=None), "optimizers must be a list of at least one, got"),
        (lambda: BestOf([one], rates=(0.1,), model=None), "rates must go with a function of a ra"),
        (
            lambda: BestOf(lambda rate: one, model=None),
            "rates must be given with a function of a ra",
        ),
        (lambda: BestOf([one], model=None, check=3), "check must be None or a function, got 3"),
        (lambda: BestOf([one], model=None, decay=1.0), "decay must be above 0 and below 1, got"),
        (
            lambda: Hedged(SGD([w]), BestOf([one], model=None), model=None),
            "fallback must be a torch.optim.Optimizer and no guard, got BestOf",
        ),
    ]
    for refused, message in cases:
        with pytest.raises(ValueError) as error:
            refused()
        assert str(error.value).startswith(message)
    guard = Recommended(SGD([w], lr=1.0), one, model=None)
    with pytest.raises(
        ValueError, match=r"^parameters must be in the optimizers when the guard is"
    ):
        guard.add_param_group({"params": [v]})
    one.add_param_group({"params": [v]})
    with pytest.raises(ValueError, match=r"^parameters must be in .* got SGD with 2 instead of 1$"):
        guard.step(lambda: None)


@pytest.mark.parametrize("kind", TWO)
def test_what_no_lane_can_take_over_is_refused(kind):
    class FullyShardedDataParallel(nn.Sequential):
        """Stands in for the wrapper of that name, which needs a process group."""

    with pytest.raises(
        ValueError, match=r"^model must be sharded by fully_shard, if it is, got Ful"
    ):
        two(kind, FullyShardedDataParallel(mlp()))
    model = mlp()
    model[0].weight.ds_id = 3  # as DeepSpeed marks what it has partitioned
    with pytest.raises(
        ValueError, match=r"^parameters must be PyTorch's own, got some that DeepSp"
    ):
        two(kind, model)
