"""What a closure may do, and what is refused."""

import math

import numpy as np
import pytest
import torch
from models import (
    KINDS,
    assert_same_state,
    backward,
    closure_for,
    guard_of,
    loss_fn,
    minibatches,
    mlp,
    quadratic,
    refuses,
    run,
    spiral,
    twins,
    two,
    two_rates,
)
from torch.optim import SGD, Adam

from lossguard.torch import BestOf, LossGuard, Recommended


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_without_backward(kind):
    model = mlp()
    guard = two(kind, model, nt=2)
    with refuses("backward must be called in each body or closure, got no gradients", "$"):
        guard.step(lambda: loss_fn(model, spiral()))
    run(guard, model, minibatches(3))
    guard.step(lambda: loss_fn(model, spiral()) * math.nan)  # it may leave it out here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [None, "3", torch.ones(2)])
def test_what_is_no_closure_or_no_loss(kind, wrong):
    model = mlp()
    guard = two(kind, model)
    with refuses("closure must be a function that returns the loss"):
        guard.step(wrong)
    with refuses("closure must return the loss, one number, got"):
        guard.step(lambda: (backward(loss_fn(model, spiral())), wrong)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_from_before_are_refused(kind):
    model = mlp()
    guard = two(kind, model)
    loss_fn(model, spiral()).backward()
    with refuses("gradients must be computed inside the closure, got some"):
        guard.step(closure_for(guard, model, spiral()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["in the closure", "prefetched", "by schedule-free ones"])
def test_a_minibatch_drawn_in_the_closure_is_told_at_once(kind, where):
    model, stream, make = mlp(), iter(minibatches(60)), None
    if where == "by schedule-free ones":
        package = pytest.importorskip("schedulefree")
        make = lambda ps: package.SGDScheduleFree(ps, lr=0.1)  # noqa: E731
    guard = two(kind, model, make, make)
    held = [next(stream)]

    def closure():
        batch = next(stream)
        if where == "prefetched":
            held.append(batch)
            batch = held.pop(0)
        return backward(loss_fn(model, batch))

    with pytest.warns(RuntimeWarning, match="closure gave different losses at the same parameters"):
        guard.step(closure)
    guard.step(closure)  # and only once


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_a_forward_pass_moves_is_told_unless_each_lane_has_its_own(kind, recwarn):
    told = []
    for own in (False, True):
        model = mlp()
        model.teacher = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        given = [p for p in model.parameters() if own or p is not model.teacher]
        optimizers = SGD(given, lr=0.1), SGD(given, lr=0.01)
        guard = guard_of(kind, optimizers, model)

        def closure(model=model):
            with torch.no_grad():
                model.teacher.lerp_(model[0].bias[:2], 0.1)
            return backward(loss_fn(model, spiral()))

        for _ in range(2):
            guard.step(closure)
        told.append([str(one.message) for one in recwarn.list])
        recwarn.clear()
    (warning,), none = told
    assert warning.startswith("closure changed parameters that no optimizer has, such as one of sh")
    assert not none


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [float, np.float64])
def test_a_loss_may_be_a_number(kind, number):
    weight, plain = quadratic()
    assert two_rates(kind, weight, 0.4, 0.1).step(lambda: number(plain().item())) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_may_write_all_losses_to_one_tensor(kind):
    models, written = twins(), torch.zeros(())
    for k, model in enumerate(models):
        guard = two(kind, model, nt=3)
        for batch in minibatches(20):
            plain = closure_for(guard, model, batch)
            guard.step((lambda plain=plain: written.copy_(plain().detach())) if k else plain)
    assert_same_state(models[1].state_dict(), models[0].state_dict())


@pytest.mark.parametrize("kind", KINDS)
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


def test_errors_of_arguments():
    w, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    half = torch.ones(1, dtype=torch.float16, requires_grad=True)
    one = SGD([w], lr=0.1)
    shared = Adam([w], lr=0.1)
    shared.param_groups = one.param_groups
    around = SGD([w], lr=0.1)
    around.fast = Adam([w], lr=0.1)  # as Lookahead and ZeroRedundancyOptimizer have one
    model = mlp()
    other, uphill, guard = SGD([w]), SGD([w], maximize=True), BestOf([one], model=None)
    pair, halves = (other, one), (SGD([half]), SGD([half]))
    kept, plain = "all that it remembers in its state", "a torch.optim.Optimizer and no guard"
    range_for = "parameters must have more range than float16 for {}, where a gradient that ove"
    cases = [
        (Recommended, (one, one), {}, "learned must have parameter groups of its"),
        (Recommended, (shared, one), {}, "learned must have parameter groups of its"),
        (Recommended, (around, one), {}, f"learned must keep {kept}, got SGD around Adam"),
        (Recommended, (SGD([v]), one), {}, "learned must have the parameters of fal"),
        (Recommended, (3, one), {}, f"learned must be {plain}, got int"),
        (Recommended, (other, uphill), {}, "fallback must minimize t"),
        (Recommended, (other, guard), {}, f"fallback must be {plain}, got BestOf"),
        (
            Recommended,
            pair,
            {"model": model},
            "model must hold all parameters of the optimizers, as its buffers go",
        ),
        (
            Recommended,
            pair,
            {"model": 3},
            "model must be a Module such as nn.ModuleList([encoder, head]), got 3",
        ),
        (Recommended, pair, {"nt": 0}, "nt must be an integer of at least 1, g"),
        (Recommended, pair, {"share": 1.0}, "share must be at least 0 and belo"),
        (LossGuard, pair, {"check": None}, "check must be a function of a number, got None"),
        (LossGuard, pair, {"check": max, "nc": 0}, "nc must be an integer of at least 1"),
        (LossGuard, pair, {"check": max, "loser": "x"}, "loser must be one of keep, res"),
        (LossGuard, halves, {"check": max}, range_for.format("LossGuard")),
        (
            BestOf,
            (SGD,),
            {"rates": (0.1,)},
            "optimizers must be a function of a rate, got the cl",
        ),
        (BestOf, ([one],), {"model": ...}, "model must be given, as its buffers go with"),
        (BestOf, ([],), {}, "optimizers must be a list of at least one, got []"),
        (BestOf, (one,), {}, "optimizers must be a list of at least one, got"),
        (BestOf, (None,), {}, "optimizers must be a list of at least one, got None"),
        (BestOf, ([one],), {"rates": (0.1,)}, "rates must go with a function of a ra"),
        (
            BestOf,
            (lambda rate: one,),
            {},
            "rates must go with a function of a rate, got none (give rates=(...))",
        ),
        (
            BestOf,
            (lambda rate: SGD(one.param_groups, lr=0.1),),
            {"rates": (0.1, 0.2)},
            "a function of a rate must use it, got for 0.2 what 0.1 gives",
        ),
        (BestOf, ([one],), {"nc": 3}, "nc must go with check=, whose minibatches it "),
        (BestOf, ([one],), {"check": 3}, "check must be None or a function, got 3"),
        (BestOf, ([one],), {"decay": 1.0}, "decay must be above 0 and below 1, got"),
    ]
    for kind, args, options, message in cases:
        with refuses(message):
            kind(*args, **{"model": None} | options)
    guard = Recommended(SGD([w], lr=1.0), one, model=None)
    with refuses("parameters must be in the optimizers when the guard is"):
        guard.add_param_group({"params": [v]})
    one.add_param_group({"params": [v]})
    with pytest.raises(ValueError, match=r"^parameters must be in .* got SGD with 2 instead of 1$"):
        guard.step(lambda: None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_lane_can_take_over_is_refused(kind):
    model = mlp()
    model[0].weight._fsdp_flattened = True  # as FullyShardedDataParallel marks parameters
    with refuses("model must be sharded by fully_shard, if it is, got Ful"):
        two(kind, model)
    model = mlp()
    model[0].weight.data = torch.empty(0)  # as DeepSpeed leaves what it has partitioned
    with refuses("parameters must have numbers, got an empty one, as Deep"):
        two(kind, model)
