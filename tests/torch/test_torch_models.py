"""Models and loops of every kind: a guarded run is Algorithm 2 on them too."""

import copy

import pytest
import torch
from algorithm2 import algorithm2, assert_same_run
from models import assert_same_state, closure_for, loss_fn, mlp, run, spiral
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from lossguard.torch import LossGuard


def learned(params):
    return Adam([p for p in params if p.requires_grad], lr=0.1)


def fallback(params):
    return SGD([p for p in params if p.requires_grad], lr=0.3, momentum=0.9)


class Tied(nn.Module):
    """Its two layers share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Idle(nn.Module):
    """One of its parameters never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.net, self.idle = mlp(), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.net(x)


class Checkpointed(nn.Module):
    """Recomputes its first part in the backward pass, with its dropout."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.3), nn.Tanh())
        self.second = nn.Linear(16, 2)

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=False))


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


MODELS = {"tied": Tied, "idle": Idle, "checkpointed": Checkpointed, "frozen": frozen}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_models(name, offload):
    model = MODELS[name]()
    batches = [spiral() for _ in range(30)]
    torch.manual_seed(1)
    expected = list(algorithm2(model, learned, fallback, batches, loss_fn, nt=3, nc=2, hedge=True))
    guard = LossGuard(
        learned(model.parameters()),
        fallback(model.parameters()),
        nt=3,
        nc=2,
        hedge=True,
        offload=offload,
        model=model,
    )
    torch.manual_seed(1)
    for batch in batches:
        torch.manual_seed(int(torch.randint(1 << 30, ())))
        run(guard, model, [batch])
    assert_same_run(guard, model, expected)


def test_compiled_models_are_compiled_once_per_mode():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model = mlp()
    twin = copy.deepcopy(model)
    batches = [spiral() for _ in range(20)]
    guards = [
        LossGuard(learned(m.parameters()), fallback(m.parameters()), nt=3, nc=2)
        for m in (model, twin)
    ]
    run(guards[0], torch.compile(model, backend=backend), batches)
    run(guards[1], twin, batches)
    assert len(compiled) == 2  # with gradients, and without
    assert_same_state(model.state_dict(), twin.state_dict())


def test_accumulation_and_clipping_in_the_closure():
    def accumulated(model, batch):
        """The mean loss of two halves, which has the gradient of the whole."""
        halves = [tuple(t[part] for t in batch) for part in (slice(None, 8), slice(8, None))]
        return sum(loss_fn(model, half) for half in halves) / 2

    class Clipped(SGD):
        def step(self, closure=None):
            loss = None if closure is None else closure()
            nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.1)
            super().step()
            return loss

    batches = [spiral() for _ in range(20)]
    model = mlp()
    expected = list(
        algorithm2(
            model,
            lambda ps: Clipped(list(ps), lr=2.0),
            lambda ps: Clipped(list(ps), lr=0.5),
            batches,
            accumulated,
            nt=3,
            nc=2,
        )
    )
    guard = LossGuard(SGD(model.parameters(), lr=2.0), SGD(model.parameters(), lr=0.5), nt=3, nc=2)
    for batch in batches:

        def closure(batch=batch):
            guard.zero_grad()
            total = 0.0
            for part in (slice(None, 8), slice(8, None)):
                loss = loss_fn(model, (batch[0][part], batch[1][part])) / 2
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return total

        guard.step(closure)
    assert [d.winner for d in guard.history] == [winner for _, winner, *_ in expected]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[-1][0][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_uses_the_weights_of_the_branch(outside):
    """Around the loop, autocast caches casts of weights, which are another branch's next time."""
    batches = [spiral() for _ in range(20)]
    model = mlp()

    def cast_loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    expected = list(algorithm2(model, learned, fallback, batches, cast_loss, nt=3, nc=2))
    guard = LossGuard(learned(model.parameters()), fallback(model.parameters()), nt=3, nc=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        for k in range(4):
            part = batches[5 * k : 5 * k + 5]
            loss = loss_fn if outside else cast_loss
            guard.cycle(lambda b, loss=loss: loss(model, b), part[:3], part[3:])
    assert_same_run(guard, model, expected)


def scaled_closure(guard, model, batch):
    def closure():
        guard.zero_grad()
        loss = loss_fn(model, batch)
        guard.scaler.scale(loss).backward()
        guard.unscale_()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    return closure


def clipped_closure(guard, model, batch):
    closure = closure_for(guard, model, batch)

    def clipped():
        loss = closure()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    return clipped


def test_scaling_by_a_power_of_two_changes_nothing():
    batches = [spiral() for _ in range(20)]
    model = mlp()
    twin = copy.deepcopy(model)
    for m, scaler, closure in (
        (model, GradScaler("cpu", init_scale=1024.0), scaled_closure),
        (twin, None, clipped_closure),
    ):
        guard = LossGuard(
            SGD(m.parameters(), lr=2.0), SGD(m.parameters(), lr=0.3), nt=3, nc=2, scaler=scaler
        )
        for batch in batches:
            guard.step(closure(guard, m, batch))
    assert_same_state(model.state_dict(), twin.state_dict())


def test_every_branch_has_a_gradient_scaler_of_its_own():
    """F(w) = w^2 at a scale of 2^100: far out, where only the learned branch gets, it overflows."""
    weight = torch.tensor([4.0], requires_grad=True)

    def build():
        learned, fallback = SGD([weight], lr=1e8, maximize=True), SGD([weight], lr=0.1)
        return LossGuard(
            learned, fallback, nt=3, nc=1, scaler=GradScaler("cpu", init_scale=2.0**100)
        )

    guard = build()

    def closure():
        loss = weight.square().sum()
        guard.scaler.scale(loss).backward()
        return loss

    for _ in range(4):
        guard.step(closure)
    decision = guard.last_decision
    assert decision.learned_loss == pytest.approx((4 + 8e8) ** 2)  # two of three steps were skipped
    assert weight.item() == pytest.approx(4 * 0.8**3)
    assert [lane.scaler.get_scale() for lane in guard._lanes.all] == [2.0**98, 2.0**100]
    resumed = build()
    resumed.load_state_dict(guard.state_dict())
    assert [lane.scaler.get_scale() for lane in resumed._lanes.all] == [2.0**98, 2.0**100]


def test_lane_z_goes_on_from_s_with_its_gradient_scale():
    """F(w) = 60 w at a scale of 2^127: it overflows until s, alone, has learned 2^122."""
    weight = torch.tensor([100.0], requires_grad=True)
    learned, fallback = SGD([weight], lr=0.0), SGD([weight], lr=0.01)
    scaler = GradScaler("cpu", init_scale=2.0**127)
    guard = LossGuard(learned, fallback, nt=10, nc=1, hedge=True, scaler=scaler)

    def closure():
        loss = 60 * weight.sum()
        guard.scaler.scale(loss).backward()
        return loss

    def cycle():
        for _ in range(11):
            guard.step(closure)
        return guard.last_decision

    assert cycle().winner == 2
    learned.param_groups[0]["lr"] = 0.02
    assert cycle().winner == 0
    learned.param_groups[0]["lr"] = 0.0
    before = weight.item()
    decision = cycle()
    assert decision.winner == 1  # a skipped step of z, and s would have won
    assert weight.item() == pytest.approx(before - 10 * 60 * 0.01)


def test_cycle_scales_losses_too():
    batches = [spiral() for _ in range(5)]
    model = mlp()
    twin = copy.deepcopy(model)
    guards = [
        LossGuard(SGD(m.parameters(), lr=2.0), SGD(m.parameters(), lr=0.3), nt=3, nc=2, scaler=s)
        for m, s in ((model, GradScaler("cpu", init_scale=1024.0)), (twin, None))
    ]
    for m, guard in zip((model, twin), guards, strict=True):
        guard.cycle(lambda b, m=m: loss_fn(m, b), batches[:3], batches[3:])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_scaler_outside_the_guard_is_refused():
    model = mlp()
    guard = LossGuard(SGD(model.parameters(), lr=2.0), SGD(model.parameters(), lr=0.3))
    scaler = GradScaler("cpu")
    closure = closure_for(guard, model, spiral())
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(guard, closure=closure)
    scaler.scale(loss_fn(model, spiral())).backward()
    with pytest.raises(ValueError) as error:
        scaler.step(guard)
    assert str(error.value) == (
        "closure must be a function that returns the loss, got None (a GradScaler goes to "
        "LossGuard as scaler)"
    )


def test_recurrent_models():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(1, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.gru(x.T[..., None])[0][-1])

    model = Last()
    batches = [spiral() for _ in range(15)]
    expected = list(algorithm2(model, learned, fallback, batches, loss_fn, nt=3, nc=2))
    guard = LossGuard(learned(model.parameters()), fallback(model.parameters()), nt=3, nc=2)
    run(guard, model, batches)
    assert_same_state(model.state_dict(), expected[-1][0])
