"""What a closure does wrong is said, not trained on; what it may do is let alone."""

import numpy as np
import pytest
import torch
from models import assert_same_state, closure_for, loss_fn, mlp, quadratic, run, spiral
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam

from lossguard.torch import BestOf, LossGuard, LossStep, ResidualGuard, recommended

schedulefree = pytest.importorskip("schedulefree")


class Momentum(nn.Module):
    """Follows the average of its own weights, as BYOL's target does."""

    def __init__(self):
        super().__init__()
        self.online, self.target = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return self.online(x) - self.target(x)


@pytest.mark.parametrize("kind", [BestOf, LossGuard, ResidualGuard])
def test_parameters_that_change_without_an_optimizer_are_refused(kind):
    model = Momentum()
    pair = (SGD(model.online.parameters(), lr=rate) for rate in (0.1, 0.01))
    guard = kind(*pair, model=model)
    with pytest.raises(ValueError, match="no optimizer has must not change in the closure, as all"):
        guard.step(closure_for(guard, model, spiral()))


def test_as_parameters_without_gradients_they_belong_to_a_lane():
    ends, batches = [], [spiral() for _ in range(12)]
    for guarded in (False, True):
        torch.manual_seed(0)
        model = Momentum()
        optimizer = SGD(model.parameters(), lr=0.1)
        if guarded:
            optimizer = BestOf(optimizer, SGD(model.parameters(), lr=1e-6), nt=2, model=model)
        for batch in batches:
            optimizer.step(closure_for(optimizer, model, batch))
        alone = [p.detach().clone() for p in model.parameters()]
        ends.append(optimizer._paths.all[0].copy if guarded else alone)
    assert_same_state(*ends)


def test_a_frozen_part_may_be_of_inference_tensors():
    with torch.inference_mode():
        base = nn.Linear(2, 2).requires_grad_(False)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model.base = base
    guard = BestOf(*(SGD(model[0].parameters(), lr=lr) for lr in (0.2, 0.1)), model=model)
    guard.step(closure_for(guard, nn.Sequential(model[0], nn.Linear(2, 2)), spiral()))


def build(net, make=LossGuard, **options):
    learned, fallback = SGD(net.parameters(), lr=0.3), SGD(net.parameters(), lr=0.1)
    options |= {"nt": 2} if make is ResidualGuard else {"nt": 2, "nc": 2}
    return make(learned, fallback, **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (LossGuard, {}),
        (LossGuard, {"scaler": GradScaler("cpu")}),
        (recommended, {}),
        (ResidualGuard, {}),
    ],
)
def test_a_closure_without_backward(make, options):
    model = mlp()
    guard, batch = build(model, make, **options), spiral()
    with pytest.raises(ValueError, match=r"^closure must call backward, got no gradients from it$"):
        guard.step(lambda: loss_fn(model, batch))
    run(build(model, make), model, [batch] * 4)


def test_a_closure_may_leave_backward_out_where_the_loss_is_not_finite():
    weight, _ = quadratic()
    learned, fallback = SGD([weight], lr=1e30), SGD([weight], lr=0.1)
    guard = LossGuard(learned, fallback, nt=3, nc=1)

    def closure():
        loss = weight.square().sum()
        if loss.isfinite():
            loss.backward()
        return loss

    for _ in range(4):
        guard.step(closure)
    assert guard.last_decision.winner == 1


def test_optimizers_that_call_the_closure_several_times_or_want_the_loss():
    class Twice(SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    class WantsLoss(SGD):
        def step(self, loss):
            super().step()

    model = mlp()
    model[0].requires_grad_(False)  # and some parameters are frozen
    learned = [Twice(model.parameters(), lr=0.1), LossStep(WantsLoss(model.parameters(), lr=0.1))]
    guard = LossGuard(learned, SGD(model.parameters(), lr=0.1), nt=2, nc=2)
    run(guard, model, [spiral() for _ in range(8)])
    assert len(guard.history) == 2


UNOWNED = (
    "model must be given where modules have buffers that training changes, such as BatchNorm's: "
    "got None"
)


@pytest.mark.parametrize("make", [LossGuard, recommended, ResidualGuard])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_buffers_that_training_changes_need_the_model(make, backend):
    model = mlp(nn.BatchNorm1d(16))
    called = model if backend is None else torch.compile(model, backend=backend)
    with pytest.raises(ValueError) as error:
        run(build(model, make), called, [spiral()])
    assert str(error.value) == UNOWNED


def test_buffers_that_it_does_not_change_do_not():
    model = mlp(nn.BatchNorm1d(16))
    model[0].register_buffer("mask", torch.tensor([True, False]))
    run(build(model, model=model), model, [spiral() for _ in range(4)])
    run(build(model.eval()), model, [spiral() for _ in range(4)])
    model = mlp(nn.BatchNorm1d(16, track_running_stats=False), nn.LayerNorm(16))
    run(build(model), model, [spiral() for _ in range(4)])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_looking_for_buffers_compiles_nothing_anew(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    model = mlp(nn.BatchNorm1d(16, track_running_stats=False))
    run(build(model), torch.compile(model, backend=counter), [spiral() for _ in range(8)])
    assert counter.frame_count == 2  # with gradients, and without


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (LossGuard, {}),
        (LossGuard, {"hedge": True}),
        (LossGuard, {"hedge": "only"}),
        (recommended, {}),
    ],
)
def test_a_closure_that_draws_its_own_minibatch(make, options):
    model = mlp()
    guard, losses = build(model, make, **options), iter(range(1, 100))

    def closure():
        guard.zero_grad()
        loss = loss_fn(model, batch) * 0 + next(losses)
        loss.backward()
        return loss

    batch = spiral()
    for _ in range(3):
        guard.step(closure)
    with pytest.raises(RuntimeWarning) as warning:  # an error here; the decision is made before
        guard.step(closure)
    assert str(warning.value) == (
        "closure gave different losses at the same parameters (2 and 1): draw the minibatch, and "
        "all random numbers but PyTorch's, outside it"
    )
    for _ in range(8):  # once
        guard.step(closure)
    assert len(guard.history) == 3


def test_lanes_elsewhere_may_have_other_losses():
    """Of an s off x, of a ratchet, and of optimizers that train at another iterate."""
    model = mlp(nn.Dropout(0.5))
    guard = build(model, recommended)
    run(guard, model, [spiral() for _ in range(400)])
    assert not all(decision.winner == 2 for decision in guard.history)
    learned = schedulefree.SGDScheduleFree(model.parameters(), lr=3.0)
    guard = LossGuard(learned, Adam(model.parameters(), lr=0.1), nt=2, nc=2)
    run(guard, model, [spiral() for _ in range(40)])
    assert len(guard.history) == 10


def test_errors_in_a_check_tell_of_it():
    model, batch = mlp(), spiral()
    guard = build(model)

    def closure():
        loss = closure_for(guard, model, batch)()
        assert sum(p.grad.norm() for p in model.parameters()) > 0
        return loss

    guard.step(closure)
    guard.step(closure)
    with pytest.raises(AttributeError) as error:
        guard.step(closure)
    assert error.value.__notes__[0].startswith("lossguard: the guard only checks here")


def test_gradient_penalties():
    model = mlp()
    guard = build(model)

    def closure(batch):
        guard.zero_grad()
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            h = model(x)
            h.retain_grad()
            (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
            loss = nn.functional.cross_entropy(h, batch[1]) + slope.square().mean()
        loss.backward()
        return loss

    for _ in range(8):
        batch = spiral()
        guard.step(lambda batch=batch: closure(batch))
    assert len(guard.history) == 2
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("misuse", ["plain", "another", "unscale_"])
def test_gradients_that_the_guards_scaler_has_not_scaled(misuse):
    model, batch, scaler = mlp(), spiral(), GradScaler("cpu", init_scale=4.0)
    guard = build(model, scaler=scaler)

    def closure():
        guard.zero_grad()
        loss = loss_fn(model, batch)
        if misuse == "plain":
            loss.backward()
        elif misuse == "another":
            scaler.scale(loss).backward()
        else:
            guard.scaler.scale(loss).backward()
            guard.scaler.unscale_(guard.learned)
        return loss

    what = "unscaled for another optimizer" if misuse == "unscale_" else "not so scaled"
    with pytest.raises(ValueError) as error:
        guard.step(closure)
    assert str(error.value) == (
        "closure must scale by guard.scaler.scale(loss) and unscale by guard.unscale_(), got "
        f"gradients {what}"
    )


def test_scalers_that_are_off():
    model = mlp()
    guard = build(model, scaler=GradScaler("cpu", enabled=False))
    run(guard, model, [spiral() for _ in range(4)])
    assert len(guard.history) == 1


def test_buffers_that_it_leaves_alone_may_hold_anything():
    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("unknown", torch.tensor([1.0, float("nan")]))
            self.register_buffer("sparse", torch.eye(2).to_sparse())
            self.register_buffer("wide", torch.ones(1).expand(5))

    for options in ({}, {"model": True}):
        model = Odd()
        options = dict.fromkeys(options, model)
        guard = build(model, **options)
        for _ in range(4):
            guard.step(closure_for(guard, model, spiral()))


@pytest.mark.parametrize("before", [None, torch.ones(1)])
@pytest.mark.parametrize("kind", [LossGuard, BestOf])
def test_buffers_that_a_forward_pass_makes_must_be_there_before(kind, before):
    class Masked(nn.Linear):
        def forward(self, x):
            self.mask = torch.ones(2)
            return super().forward(x) * self.mask

    model = Masked(2, 2)
    model.register_buffer("mask", before)
    guard = kind(SGD(model.parameters()), SGD(model.parameters()), model=model)
    with pytest.raises(ValueError, match=r"^model must keep the number and the shapes of its"):
        guard.step(closure_for(guard, model, spiral()))


def test_buffers_that_are_replaced_need_the_model():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    model = Counts()
    guard = build(model)
    with pytest.raises(ValueError, match=r"^model must be given where modules have buffers"):
        guard.step(closure_for(guard, model, spiral()))


def test_an_optimizer_that_wants_the_loss_gets_it_beside_a_scaler():
    class WantsLoss(SGD):
        def step(self, loss):
            assert float(loss) > 0
            super().step()

    model = mlp()
    scaler = GradScaler("cpu", init_scale=4.0)
    learned, fallback = WantsLoss(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    guard = LossGuard(LossStep(learned), fallback, nt=1, nc=1, scaler=scaler)

    def closure():
        guard.zero_grad()
        loss = loss_fn(model, spiral())
        guard.scaler.scale(loss).backward()
        return loss

    for _ in range(2):
        guard.step(closure)
    assert guard.last_decision.finite_learned


@pytest.mark.parametrize("number", [float, np.float32, np.float64])
def test_a_loss_may_be_a_number(number):
    w, closure = quadratic()
    guard = BestOf(SGD([w], lr=0.2), SGD([w], lr=0.1), nt=1)
    assert guard.step(lambda: number(closure().item())) == 16.0
    assert guard.last_decision.losses == [16.0]


@pytest.mark.parametrize("kind", [LossGuard, BestOf, ResidualGuard])
def test_a_closure_may_write_all_losses_to_one_tensor(kind):
    """As CUDA graphs do, and whoever adds up losses in a tensor."""
    options = {"nc": 1} if kind is LossGuard else {}
    runs = []
    for one in (None, torch.zeros(())):
        w, closure = quadratic()
        guard = kind(SGD([w], lr=0.2), SGD([w], lr=0.1), nt=2, **options)

        def written(closure=closure, one=one):
            loss = closure()
            return loss if one is None else one.copy_(loss.detach())

        losses = [guard.step(written).item() for _ in range(6)]
        runs.append((losses, repr(guard.history), w.item()))
    assert runs[0] == runs[1]
