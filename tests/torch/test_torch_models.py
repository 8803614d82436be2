"""Models, precisions and packages of every kind: a guarded run is Algorithm 2 on them too."""

import copy
import math
from collections import defaultdict

import pytest
import torch
from models import (
    KINDS,
    WRITTEN,
    Differences,
    Writing,
    algorithm2,
    assert_is_algorithm2,
    assert_resumes,
    assert_same_state,
    backward,
    check_of,
    closure_for,
    guard_of,
    loss_fn,
    minibatches,
    mlp,
    refuses,
    run,
    spiral,
    squares,
    step_by,
    twins,
    two,
)
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from lossguard.torch import BestOf, LossGuard, Recommended


def learned(params):
    return Adam([p for p in params if p.requires_grad], lr=0.1)


def fallback(params):
    return SGD([p for p in params if p.requires_grad], lr=0.3, momentum=0.9)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BestOf, {}),
        (BestOf, {"nt": 1, "check": lambda k: torch.tensor(1.0)}),
    ],
)
def test_gradients_of_what_another_optimizer_steps_are_those_of_the_live_lane(kind, options):
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), torch.ones(4, 2)
    beside = SGD(model[0].parameters(), lr=0.1)
    optimizers = [SGD(model[2].parameters(), lr=lr) for lr in (0.1, 0.01)]
    guard = guard_of(kind, optimizers, model, **options)
    for earlier in (0.0, 0.0, 1.0):  # one that was accumulated before stays
        beside.zero_grad()
        model(x).square().mean().backward()
        expected = [p.grad + earlier for p in model[0].parameters()]
        model.zero_grad()
        for p in model[0].parameters():
            p.grad = torch.full_like(p, earlier) if earlier else None
        guard.step(lambda: backward(model(x).square().mean()))
        guard.eval()  # as trainers do before they validate
        torch.testing.assert_close([p.grad for p in model[0].parameters()], expected)
        beside.step()


@pytest.mark.parametrize("counter", WRITTEN)
def test_a_counter_that_a_step_writes_to_is_each_lanes_own(counter):
    """The fallback by itself takes the steps that it would alone."""
    w, v = (nn.Parameter(torch.tensor([4.0])) for _ in range(2))
    learned, fallback = SGD([w], lr=0.05), Writing([w], lr=0.01, counter=counter)
    guard, alone = Recommended(learned, fallback, model=None, share=0.5), Writing([v], lr=0.01)
    for _ in range(60):
        guard.step(squares(w))
    own = guard._lanes["s"]
    steps = own.memory.now.options[0]["k"][0]
    for _ in range(int(steps)):
        step_by(alone, v.square().sum())
    assert guard.last_decision.winner == 0  # it runs beside another lane of its optimizer
    assert 10 < steps < 60 and own.point[0] == v


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("kind", [Recommended, LossGuard])
def test_a_buffer_that_is_sparse_stands_beside_what_is_not_finite(kind, layout):
    """And beside lanes with equal parameters, which are compared."""
    model = mlp()
    model.register_buffer("graph", getattr(torch.eye(3), layout)())
    pair = [SGD(model.parameters(), lr=rate) for rate in (0.1, 0.01)]
    guard = guard_of(kind, pair, model, nt=1)
    losses = run(guard, model, minibatches(3))
    for optimizer in pair:
        optimizer.param_groups[0]["lr"] = 0.0
    x, labels = minibatches(1)[0]
    losses += run(guard, model, [(x, labels), (x * math.nan, labels), (x, labels)])
    assert torch.stack(losses).isfinite().tolist() == [*[True] * 4, False, True]
    assert torch.equal(model.graph.to_dense(), torch.eye(3))


def test_a_buffer_that_is_the_input_belongs_to_the_user():
    """Lanes that get into the model would write to it, and the fallback have others' inputs."""
    torch.manual_seed(0)
    data = torch.randn(30, 4, 2)
    before, model = data.clone(), Differences()
    alone = copy.deepcopy(model)
    idle, sgd, its = (
        SGD(m.parameters(), lr=lr) for m, lr in ((model, 1e-6), (model, 0.01), (alone, 0.01))
    )
    guard = Recommended(idle, sgd, model=model)
    for x in data:
        for lane in guard.lanes():
            loss = model(x).square().mean()
            loss.backward()
            lane.step(loss)
        step_by(its, alone(x).square().mean())
    assert torch.equal(data, before)
    assert_same_state(model.state_dict(), alone.state_dict())


class Tied(nn.Module):
    """Its two layers share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Idle(nn.Module):
    """One of its parameters never gets a gradient, one buffer is a mask."""

    def __init__(self):
        super().__init__()
        self.net, self.idle = mlp(), nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

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


class Flat(nn.Module):
    """Its parameters are views of one storage, as cuDNN's are; so they are copied in and out."""

    def __init__(self):
        super().__init__()
        flat = torch.randn(2 * 2 + 2)
        self.weight, self.bias = nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[4:])
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(nn.functional.linear(x, self.weight, self.bias))


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


MODELS = {
    "tied": Tied, "idle": Idle, "checkpointed": Checkpointed, "frozen": frozen, "flat": Flat,
    "norm": lambda: mlp(nn.BatchNorm1d(16), nn.Dropout(0.2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    assert_is_algorithm2(
        MODELS[name](), learned, fallback, [spiral() for _ in range(30)], nt=3, nc=2
    )


def test_compiled_models_are_compiled_once_per_mode():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model, twin = twins()
    fast = torch.compile(model, backend=backend)
    guards = [
        two(LossGuard, m, nt=3, check=check_of(called))
        for m, called in ((model, fast), (twin, twin))
    ]
    run(guards[0], fast, minibatches(20))
    run(guards[1], twin, minibatches(20))
    assert len(compiled) == 2  # with gradients, and without
    assert_same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_uses_the_weights_of_the_branch(outside):
    """Around the loop, autocast caches casts of weights, which are another branch's next time."""
    batches = minibatches(20)
    model = mlp()

    def cast_loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    expected = list(algorithm2(model, learned, fallback, batches, loss_fn=cast_loss, nt=3, nc=2))
    loss_of = loss_fn if outside else cast_loss
    trained, held_out = ([b for i, b in enumerate(batches) if (i % 5 < 3) == one] for one in (1, 0))
    check = check_of(model, held_out, loss_of)
    guard = two(LossGuard, model, learned, fallback, nt=3, check=check)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        for batch in trained:
            guard.step(lambda batch=batch: backward(loss_of(model, batch)))
    assert [d.winner for d in guard.history] == [winner for _, winner in expected]
    torch.testing.assert_close(model.state_dict(), expected[-1][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [Recommended, BestOf])
def test_every_lane_may_have_a_scaler(kind):
    """Scaling by a power of two changes nothing; a step that overflows is one of gradients of 0."""
    models = twins()
    guards = [two(kind, model.double(), nt=3) for model in models]
    scalers = defaultdict(lambda: GradScaler("cpu", init_scale=1024.0))
    for k, (x, labels) in enumerate(minibatches(40)):
        for guard, model in zip(guards, models, strict=True):
            for lane in guard.lanes():
                loss = loss_fn(model, (x.double(), labels))
                scaler = scalers[lane.name] if guard is guards[0] else GradScaler(enabled=False)
                scaler.scale(loss).backward()
                if k == 7:
                    model[0].bias.grad.fill_(torch.inf if guard is guards[0] else 0)
                    if guard is guards[1]:
                        for p in model.parameters():
                            p.grad.zero_()
                scaler.unscale_(lane.optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                lane.step(loss)
                scaler.update()
    assert_same_state(models[0].state_dict(), models[1].state_dict())
    assert len(scalers) > 1 and 512.0 in {one.get_scale() for one in scalers.values()}


def test_a_scaler_outside_the_lanes_is_refused():
    """As Lightning and Accelerate would use it in float16."""
    model = mlp()
    guard = two(LossGuard, model)
    scaler = GradScaler("cpu")
    closure = closure_for(guard, model, spiral())
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(guard, closure=closure)
    scaler.scale(loss_fn(model, spiral())).backward()
    told = "closure must be a function that returns the loss, got None (or loop over guard.lanes(),"
    with refuses(f"{told} as float16 needs)", "$"):
        scaler.step(guard)


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_a_forward_pass_makes_must_be_there_before(kind):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.register_buffer("mask", torch.ones(1))

        def forward(self, x):
            self.mask = torch.ones(3)
            return self.net(x)

    model = Masked()
    guard = two(kind, model, nt=2)
    with pytest.raises(ValueError, match=r"^model must keep the number and the shapes of its buff"):
        run(guard, model, minibatches(3))


def test_a_buffer_of_one_number_for_many_is_left_alone():
    model = mlp()
    model.register_buffer("mask", torch.zeros(1).expand(5))
    run(two(Recommended, model, nt=2), model, minibatches(8))


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_goes_on_by_itself(name):
    """It is in its training mode within calls; ``eval`` has the model be what it evaluates."""
    package = pytest.importorskip("schedulefree")
    make = getattr(package, name)
    model, twin = twins()
    alone = make(twin.parameters(), lr=0.05)
    alone.train()
    guard = two(BestOf, model, lambda ps: SGD(ps, lr=0.0), lambda ps: make(ps, lr=0.05), nt=3)
    for batch in minibatches(20):
        step_by(alone, loss_fn(twin, batch))
        guard.step(closure_for(guard, model, batch))
    assert_same_state(model.state_dict(), twin.state_dict())
    alone.eval()
    guard.eval()
    assert_same_state(model.state_dict(), twin.state_dict())
    alone.train()
    batch = spiral()
    step_by(alone, loss_fn(twin, batch))
    guard.step(closure_for(guard, model, batch))  # back by itself
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


def test_to_evaluate_changes_nothing_of_the_run():
    """Two lanes of an optimizer with ``eval``; the other one's memory may be in it."""
    package = pytest.importorskip("schedulefree")
    runs = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = mlp()
        makers = (lambda ps: Adam(ps, 0.05)), (lambda ps: package.AdamWScheduleFree(ps, 0.001))
        guard = two(Recommended, model, *makers, nt=2, share=0.5)
        for batch in minibatches(1) * 300:
            guard.step(closure_for(guard, model, batch))
            if looks:
                guard.eval()
        runs.append(guard.history)
        guard.eval()
    history, other = runs
    assert len({d.winner for d in history}) == 3
    assert [d.winner for d in history] == [d.winner for d in other]
    for one, mine in zip(history, other, strict=True):
        assert one.losses == pytest.approx(mine.losses, rel=1e-3)


OTHERS = ["SOAP", "Lion", "Prodigy", "Adan", "Shampoo", "AdEMAMix"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("package", "name", "settings", "done"),
    [
        *(("pytorch_optimizer", name, {"lr": 0.01}, 13) for name in OTHERS),
        ("schedulefree", "AdamWScheduleFree", {"lr": 0.05, "warmup_steps": 3}, 6),
        ("schedulefree", "AdamWScheduleFree", {"lr": 0.05, "warmup_steps": 3}, 7),
    ],
)
def test_optimizers_of_packages_resume_bit_by_bit(kind, package, name, settings, done):
    make = getattr(pytest.importorskip(package), name)

    def build(model):
        options = {} if kind is LossGuard else {"share": 0.5}
        return two(kind, model, lambda ps: make(ps, **settings), nt=3, **options)

    assert_resumes(build, mlp(), minibatches(30), done)


def test_a_group_entry_that_the_first_step_makes_is_memory():
    """As nearly all of pytorch_optimizer's keep their count of steps."""

    class Counting(SGD):  # uphill, so that it loses
        def step(self, closure=None):
            group = self.param_groups[0]
            group["t"] = group.get("t", 0) + 1
            for p in group["params"]:
                p.grad.neg_()
            return super().step(closure)

    for loser, expected in (("reset", {}), ("keep", {"t": 4})):
        model = mlp()
        guard = two(LossGuard, model, lambda ps: Counting(ps, lr=5.0), nt=2, loser=loser)
        run(guard, model, minibatches(4))
        (group,) = guard._lanes["y"].memory.now.options
        assert {key: value for key, value in group.items() if key == "t"} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_parameter_may_be_a_mask(kind):
    """Which isn't finite, and so says nothing of a lane; one that is trained is refused."""
    model = mlp()
    model.mask = nn.Parameter(torch.full((3, 3), -math.inf).triu(1), requires_grad=False)
    before = copy.deepcopy([p for p in model.parameters() if p.requires_grad])
    guard = two(kind, model, nt=2)
    run(guard, model, minibatches(20))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all((p != old).any() for p, old in zip(trained, before, strict=True))
    assert all(one.winner >= 0 for one in guard.history)
    model.mask.requires_grad_(True)
    with pytest.raises(ValueError, match="parameters must be finite, got some that aren't and are"):
        two(kind, model)
