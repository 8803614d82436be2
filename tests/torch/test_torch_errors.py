"""What the guards refuse, and the sentence with which they do."""

import pytest
import torch
from models import quadratic, squares
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lossguard.torch import (
    BestOf,
    LossGuard,
    LossStep,
    ResidualGuard,
    backoff,
    curtailed_criterion,
    mean_criterion,
    paired_criterion,
    ratchet,
    recommended,
    sequential_criterion,
    track_record,
)


class IgnoresClosure(SGD):
    def step(self, closure=None):
        return super().step()


class TakesNone(SGD):
    def step(self):
        return super().step()


ONE = torch.ones(1, requires_grad=True)


def sgd(weight):
    return SGD([weight], lr=0.1)


REFUSALS = [
    (lambda w: LossGuard(torch.optim.LBFGS([w]), sgd(w)),
     "learned must be an optimizer that calls its closure once a step, got LBFGS"),
    (lambda w: LossGuard(sgd(w), torch.optim.LBFGS([w])),
     "fallback must be an optimizer that calls its closure once a step, got LBFGS"),
    (lambda w: BestOf(sgd(w), SGD([{"params": [w], "maximize": True}], lr=0.1)),
     "fallback must minimize the loss, got one with maximize=True"),
    (lambda w: BestOf(sgd(w), sgd(w), scaler=True),
     "scaler must be None or a torch.amp.GradScaler, got True"),
    (lambda w: LossGuard(sgd(w), sgd(w), callback="print"),
     "callback must be None or a function of a decision, got 'print'"),
    (lambda w: LossGuard(sgd(w), sgd(w), schedulers=["cosine"]),
     "schedulers must be of torch.optim.lr_scheduler, got 'cosine'"),
    (lambda w: BestOf(sgd(w), sgd(w), nt=1).cycle(lambda b: 1.0, [1]),
     "loss_fn must return the loss, one number, got 1.0"),
    (lambda w: BestOf(sgd(w), sgd(w), nt=1).cycle(lambda b: torch.stack([w, w]), [1]),
     "loss_fn must return the loss, one number, got a tensor of shape [2, 1]"),
    (lambda w: BestOf(sgd(w), sgd(w), nt=1).cycle(lambda b: squares(w)(), [1]),
     "loss_fn must leave backward to the guard, got gradients"),
    (lambda w: BestOf(TakesNone([w]), sgd(w)).step(lambda: 1.0),
     "learned must be an optimizer whose step(closure) calls the closure, got TakesNone "
     "(LossStep adapts one with step(loss))"),
    (lambda w: LossGuard("adam", sgd(w)),
     "learned must be a torch.optim.Optimizer, got 'adam'"),
    (lambda w: LossGuard(*[sgd(w)] * 2),
     "learned must be another optimizer than fallback, got the same one"),
    (lambda w: LossGuard(sgd(torch.ones(1, requires_grad=True)), sgd(w)),
     "learned must have the parameters of fallback, 1 tensors, got 1, of which 0 are the same"),
    (lambda w: LossGuard(sgd(w), sgd(w), nt=0),
     "nt must be an integer of at least 1, got 0"),
    (lambda w: LossGuard(sgd(w), sgd(w), nc=2.0),
     "nc must be an integer of at least 1, got 2.0"),
    (lambda w: LossGuard(sgd(w), sgd(w), loser="forget"),
     "loser must be one of keep, rollback, reset, got 'forget'"),
    (lambda w: LossGuard([], sgd(w)),
     "the number of learned optimizers must be an integer of at least 1, got 0"),
    (lambda w: LossGuard([sgd(w), f := sgd(w)], f),
     "learned must be another optimizer than fallback, got the same one"),
    (lambda w: LossGuard([sgd(w)] * 2, sgd(w)),
     "learned must be different optimizers, got one of them twice"),
    (lambda w: LossGuard(sgd(w), sgd(w), hedge="all"),
     "hedge must be False, True, 'only' or track_record(), got 'all'"),
    (lambda w: track_record(decay=1),
     "decay must be above 0 and below 1, got 1"),
    (lambda w: LossGuard(sgd(w), sgd(w), criterion=paired_criterion(), nc=1),
     "nc must be at least 2 for this criterion, got 1"),
    (lambda w: LossGuard(sgd(w), sgd(w), criterion=mean_criterion(training=4), nt=3),
     "nt must be at least 4 for this criterion, got 3"),
    (lambda w: mean_criterion(training=-1),
     "training must be an integer of at least 0, got -1"),
    (lambda w: paired_criterion(confidence=1),
     "confidence must be at least 0.5 and below 1, got 1"),
    (lambda w: sequential_criterion(confidence=0.4),
     "confidence must be at least 0.5 and below 1, got 0.4"),
    (lambda w: sequential_criterion(first=2.5),
     "first must be an integer of at least 1, got 2.5"),
    (lambda w: curtailed_criterion(most=40.5),
     "most must be an integer of at least 1, got 40.5"),
    (lambda w: recommended(sgd(w), sgd(w), most=40.5),
     "most must be an integer of at least 0, got 40.5"),
    (lambda w: sequential_criterion(first=1),
     "first must be between 2 and most = 160, got 1"),
    (lambda w: sequential_criterion(first=9, most=8),
     "first must be between 2 and most = 8, got 9"),
    (lambda w: curtailed_criterion(first=170),
     "first must be between 2 and most = 160, got 170"),
    (lambda w: backoff(patience=0),
     "patience must be an integer of at least 1, got 0"),
    (lambda w: backoff(most=0.5),
     "most must be an integer of at least 1, got 0.5"),
    (lambda w: backoff(start="again"),
     "start must be one of keep, reset, got 'again'"),
    (lambda w: LossGuard(sgd(w), sgd(w), criterion=mean_criterion),
     f"criterion must be a Criterion such as mean_criterion(), got {mean_criterion!r}"),
    (lambda w: LossGuard(sgd(w), sgd(w), probing=backoff),
     f"probing must be a Probing such as backoff(), got {backoff!r}"),
    (lambda w: LossGuard(sgd(w), sgd(w), ratchet=ratchet),
     f"ratchet must be a Ratchet such as ratchet(), got {ratchet!r}"),
    (lambda w: LossGuard(sgd(w), sgd(w), offload="disk"),
     "offload must be None or 'cpu', got 'disk'"),
    (lambda w: LossGuard(sgd(w), sgd(w), schedulers=[StepLR(sgd(w), 1)]),
     "schedulers must be built on learned or fallback, got one on SGD"),
    (lambda w: LossGuard(f := sgd(w), sgd(w), schedulers=[ReduceLROnPlateau(f)]),
     "schedulers must step without a metric, got ReduceLROnPlateau (step it yourself)"),
    (lambda w: LossGuard(f := sgd(w), sgd(w), schedulers=StepLR(f, 1)),
     "schedulers must be a list, got StepLR"),
    (lambda w: LossGuard(sgd(w), sgd(w), model=nn.Linear(1, 1)),
     "model must be an nn.Module that holds parameters of the optimizers, got one without"),
    (lambda w: ResidualGuard(sgd(w), sgd(w), model=nn.Linear(1, 1)),
     "model must be an nn.Module that holds parameters of the optimizers, got one without"),
    (lambda w: LossGuard(sgd(w), sgd(w), model=[w]),
     f"model must be an nn.Module that holds parameters of the optimizers, got {[ONE]!r}"),
    (lambda w: recommended(sgd(w), sgd(w), hedge=True),
     "recommended sets hedge itself: use LossGuard to choose"),
    (lambda w: recommended(sgd(w), sgd(w), patience=0),
     "patience must be an integer of at least 1, got 0"),
    (lambda w: LossGuard(sgd(w), sgd(w)).step(w.sum()),
     "closure must be a function that returns the loss, got a tensor of shape []"),
    (lambda w: LossStep(sgd(w)).step(w.sum()),
     "closure must be a function that returns the loss, got a tensor of shape []"),
    (lambda w: LossGuard(sgd(w), sgd(w)).step(),
     "closure must be a function that returns the loss, got None (a GradScaler goes to "
     "LossGuard as scaler)"),
    (lambda w: LossGuard(sgd(w), sgd(w)).step(lambda: None),
     "closure must return the loss, one number, got None"),
    (lambda w: LossGuard(sgd(w), sgd(w)).step(lambda: torch.ones(2)),
     "closure must return the loss, one number, got a tensor of shape [2]"),
    (lambda w: LossGuard(IgnoresClosure([w]), sgd(w)).step(lambda: 1.0),
     "learned must be an optimizer whose step(closure) calls the closure, got IgnoresClosure "
     "(LossStep adapts one with step(loss))"),
    (lambda w: (w.sum().backward(), LossGuard(sgd(w), sgd(w)).step(lambda: 1.0)),
     "gradients must be computed inside the closure, got some before the step (call zero_grad "
     "before it, and accumulate inside the closure)"),
    (lambda w: LossGuard(sgd(w), sgd(w)).cycle(lambda b: w.sum(), [1], [2]),
     "train_batches must be 10 minibatches, got 1 "
     "(itertools.chain.from_iterable(itertools.repeat(loader)) doesn't end)"),
    (lambda w: LossGuard(sgd(w), sgd(w), nt=1).cycle(lambda b: w.sum(), [1, 2], [3]),
     "train_batches must be 1 minibatches, got more "
     "(itertools.islice(batches, guard.nt) draws so many)"),
    (lambda w: LossGuard(sgd(w), sgd(w), nt=1, nc=2).cycle(lambda b: w.sum(), [1], [2]),
     "check_batches must be at least 2 minibatches, got 1 "
     "(itertools.chain.from_iterable(itertools.repeat(loader)) doesn't end)"),
    (lambda w: LossGuard(sgd(w), sgd(w)).load_state_dict(sgd(w).state_dict()),
     "state_dict must be a LossGuard's, got one with the keys ['state', 'param_groups']"),
    (lambda w: LossGuard(sgd(w), sgd(w)).load_state_dict(
        ResidualGuard(sgd(w), sgd(w)).state_dict()),
     "state_dict must be a LossGuard's, got a ResidualGuard's"),
    (lambda w: LossGuard(sgd(w), sgd(w), hedge=True).load_state_dict(
        LossGuard(sgd(w), sgd(w)).state_dict()),
     "state_dict must have the lanes y, z, s, got y, z (learned and hedge must be as they were)"),
]  # fmt: skip


@pytest.mark.parametrize(("refused", "message"), REFUSALS, ids=[m[:40] for _, m in REFUSALS])
def test_errors(refused, message):
    with pytest.raises(ValueError) as error:
        refused(torch.ones(1, requires_grad=True))
    assert str(error.value) == message


@pytest.mark.parametrize("kind", [BestOf, LossGuard])
def test_train_minibatches_without_an_end_are_refused(kind):
    def endless():
        yield from range(4)
        pytest.fail("went on")

    weight, _ = quadratic()
    guard = kind(sgd(weight), sgd(weight), nt=3)
    with pytest.raises(ValueError, match=r"^train_batches must be 3 minibatches, got more"):
        guard.cycle(lambda batch: weight.sum(), endless(), [])


@pytest.mark.parametrize("kind", [BestOf, LossGuard])
def test_a_scaler_that_was_not_given_is_no_attribute(kind):
    weight, _ = quadratic()
    guard = kind(sgd(weight), sgd(weight))
    assert not hasattr(guard, "scaler")
    with pytest.raises(AttributeError) as error:
        guard.unscale_()
    assert str(error.value) == f"scaler must be given to {kind.__name__} to scale losses, got None"


def test_an_error_of_a_hook_is_its_own():
    weight, closure = quadratic()
    learned = sgd(weight)
    learned.register_step_pre_hook(lambda *_: {}["rate"])
    with pytest.raises(KeyError, match="rate"):
        BestOf(learned, sgd(weight)).step(closure)


@pytest.mark.parametrize("kind", [BestOf, LossGuard, ResidualGuard])
def test_parameters_that_one_optimizer_alone_has_got_are_refused(kind):
    weight, closure = quadratic()
    guard = kind(sgd(weight), fallback := sgd(weight))
    guard.step(closure)
    fallback.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    with pytest.raises(ValueError) as error:
        guard.step(closure)
    assert str(error.value) == (
        "parameters must be added by the guard's add_param_group, got SGD with 2 instead of 1"
    )


@pytest.mark.parametrize("kind", [BestOf, LossGuard, ResidualGuard])
def test_a_group_that_one_optimizer_refuses_no_optimizer_gets(kind):
    class Refuses(SGD):
        def add_param_group(self, param_group):
            if len(self.param_groups) == 1:
                raise KeyError
            super().add_param_group(param_group)

    weight, closure = quadratic()
    guard = kind(Refuses([weight], lr=0.1), sgd(weight))
    with pytest.raises(KeyError):
        guard.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    assert len(guard.learned.param_groups) == len(guard.fallback.param_groups) == 1
    guard.step(closure)


def test_errors_within_a_cycle():
    weight, closure = quadratic()
    guard = LossGuard(sgd(weight), sgd(weight), nt=2, nc=1)
    guard.step(closure)
    with pytest.raises(ValueError) as error:
        guard.cycle(lambda batch: weight.sum(), [1, 2], [3])
    assert str(error.value) == (
        "cycle must start where the last one ended, got one after 1 minibatches of it"
    )
    other = LossGuard(sgd(weight), sgd(weight), nt=4, nc=1)
    with pytest.raises(ValueError) as error:
        other.load_state_dict(guard.state_dict())
    assert str(error.value) == (
        "state_dict from within a cycle must have nt=4 and checks after [1], got nt=2 and [1]"
    )


def test_a_state_dict_of_other_schedulers_is_refused():
    weight, _ = quadratic()
    fallback = sgd(weight)
    guard = LossGuard(sgd(weight), fallback, schedulers=[StepLR(fallback, 1)])
    with pytest.raises(ValueError, match=r"^state_dict must be of 1 schedulers, got one of 0$"):
        guard.load_state_dict(LossGuard(sgd(weight), sgd(weight)).state_dict())
