"""The guards keep the contract of ``torch.optim.Optimizer``."""

import copy
import io
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from algorithm2 import algorithm2, assert_same_run
from models import assert_resumes, assert_same_state, loss_fn, mlp, quadratic, run, spiral, squares
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from lossguard.torch import (
    BestOf,
    LossGuard,
    LossStep,
    ResidualGuard,
    arithmetic_average,
    backoff,
    curtailed_criterion,
    ema,
    geometric,
    mean_criterion,
    paired_criterion,
    ratchet,
    recent_max,
    recent_term,
    sequential_criterion,
    track_record,
)

NAMES = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
)
REFUSED = {"LBFGS"}
SPARSE = {"SparseAdam"}


def variants():
    for name in NAMES:
        if name not in REFUSED | SPARSE:
            yield pytest.param(name, {}, id=name)
    for name in ("SGD", "Adam", "AdamW", "Adagrad"):
        yield pytest.param(name, {"foreach": True}, id=f"{name}-foreach")
        yield pytest.param(name, {"fused": True}, id=f"{name}-fused")


def matrices():
    """A model whose parameters are all matrices, which is all that Muon takes."""
    return nn.Sequential(nn.Linear(2, 16, bias=False), nn.Tanh(), nn.Linear(16, 2, bias=False))


@pytest.mark.parametrize(("name", "options"), list(variants()))
@pytest.mark.parametrize("side", ["learned", "fallback"])
@pytest.mark.parametrize("loser", ["keep", "rollback", "reset"])
def test_every_optimizer_on_either_side(name, options, side, loser):
    def tested(params):
        return getattr(torch.optim, name)(params, **options)

    def other(params):
        return SGD(params, lr=0.05)

    learned, fallback = (tested, other) if side == "learned" else (other, tested)
    batches = [spiral(16) for _ in range(20)]
    model = matrices()
    expected = list(
        algorithm2(model, learned, fallback, batches, loss_fn, nt=3, nc=2, loser=loser, hedge=True)
    )
    guard = LossGuard(
        learned(model.parameters()),
        fallback(model.parameters()),
        nt=3,
        nc=2,
        loser=loser,
        hedge=True,
    )
    run(guard, model, batches)
    assert_same_run(guard, model, expected)


def test_sparse_gradients():
    def model():
        return nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Flatten())

    def sparse_loss(model, batch):
        return model(batch).square().mean()

    def learned(params):
        return torch.optim.SparseAdam(list(params), lr=0.1)

    def fallback(params):
        return SGD(params, lr=0.5)

    batches = [torch.randint(0, 8, (3,)) for _ in range(15)]
    tested = model()
    expected = list(algorithm2(tested, learned, fallback, batches, sparse_loss, nt=3, nc=2))
    guard = LossGuard(learned(tested.parameters()), fallback(tested.parameters()), nt=3, nc=2)
    for k in range(3):
        part = batches[5 * k : 5 * k + 5]
        guard.cycle(lambda batch: sparse_loss(tested, batch), part[:3], part[3:])
    assert_same_run(guard, tested, expected)


def build(model, *, several=False, **options):
    learned, fallback = AdamW(model.parameters(), lr=0.1), Adam(model.parameters(), lr=0.01)
    return LossGuard(
        [learned, SGD(model.parameters(), lr=1.0)] if several else learned,
        fallback,
        nt=3,
        nc=2,
        model=model,
        schedulers=[
            OneCycleLR(learned, max_lr=0.1, total_steps=100),
            LambdaLR(fallback, lambda t: 1 / (1 + t / 10)),
        ],
        **options,
    )


def stochastic():
    return mlp(nn.BatchNorm1d(16), nn.Dropout(0.2))


SEQUENTIAL = sequential_criterion(confidence=0.7, first=2, most=6)
OPTIONS = [
    *({"loser": loser, "hedge": True} for loser in ("keep", "rollback", "reset")),
    *({"loser": loser, "hedge": False} for loser in ("keep", "rollback", "reset")),
    {"hedge": "only", "criterion": paired_criterion(confidence=0.7)},
    {"hedge": track_record(decay=0.5), "criterion": SEQUENTIAL, "several": True},
    {"probing": backoff(patience=1, most=2, start="reset"), "loser": "rollback"},
    {"probing": backoff(patience=1, most=1), "hedge": True, "several": True},
    {"probing": backoff(patience=1, most=1), "hedge": "only", "criterion": SEQUENTIAL},
]  # fmt: skip


@pytest.mark.parametrize("done", range(5, 13))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_resumes_bit_by_bit_at_any_point_of_a_cycle(done, options):
    batches = [spiral(16) for _ in range(30)]
    assert_resumes(partial(build, **options), stochastic(), batches, done)


def test_a_state_dict_shares_nothing_with_the_guard():
    model = stochastic()
    guard = build(model, hedge=True, loser="rollback")
    run(guard, model, [spiral() for _ in range(7)])
    saved = guard.state_dict()
    before = copy.deepcopy(saved)
    batches = [spiral() for _ in range(6)]
    run(guard, model, batches)
    assert_same_state(saved, before)
    guard.load_state_dict(saved)
    run(guard, model, batches)
    assert_same_state(saved, before)


def test_loading_keeps_the_dtype_of_states():
    model = mlp().bfloat16()
    guard = LossGuard(
        SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1, momentum=0.9), nt=1, nc=1
    )
    p = next(model.parameters())
    guard.fallback.state[p]["momentum_buffer"] = torch.full(p.shape, 1 / 3)
    factors = [torch.full((2,), 1 / 3), (torch.full((2,), 1 / 3), None, "inverse")]
    guard.fallback.state[p] |= {"factors": factors, "name": "kronecker"}  # as SOAP's lists
    saved = guard.state_dict()
    guard.load_state_dict(saved)
    assert torch.equal(guard.fallback.state[p]["momentum_buffer"], torch.full(p.shape, 1 / 3))
    assert_same_state(guard.state_dict(), saved)


def of_loss_guard(model, criterion):
    return LossGuard(
        Adam(model.parameters(), lr=0.1),
        SGD(model.parameters(), lr=0.1, momentum=0.9),
        nt=3,
        nc=2,
        model=model,
        hedge=True,
        criterion=criterion(),
        probing=backoff(patience=1),
        ratchet=ratchet(cycles=1),
    )


def of_residual_guard(model, sequence):
    return ResidualGuard(
        Adam(model.parameters(), lr=0.1),
        SGD(model.parameters(), lr=0.1, momentum=0.9),
        nt=3,
        model=model,
        sequence=sequence(),
    )


def of_best_of(model):
    params = list(model.parameters())
    return BestOf(Adam(params, lr=0.1), SGD(params, lr=0.1, momentum=0.9), nt=3, model=model)


COPIED = {
    "best_of": of_best_of,
    "mean": partial(of_loss_guard, criterion=mean_criterion),
    "paired": partial(of_loss_guard, criterion=paired_criterion),
    "sequential": partial(of_loss_guard, criterion=partial(sequential_criterion, first=2, most=4)),
    "curtailed": partial(of_loss_guard, criterion=partial(curtailed_criterion, first=2, most=4)),
    "geometric": partial(of_residual_guard, sequence=partial(geometric, 0.9)),
    "recent_term": partial(of_residual_guard, sequence=recent_term),
    "arithmetic_average": partial(of_residual_guard, sequence=arithmetic_average),
    "ema": partial(of_residual_guard, sequence=partial(ema, 0.9)),
    "recent_max": partial(of_residual_guard, sequence=recent_max),
}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("done", [5, 7])
@pytest.mark.parametrize("make", COPIED.values(), ids=list(COPIED))
def test_copies_go_on_alike(make, copied, done):
    batches = [spiral() for _ in range(20)]
    model = stochastic()
    guard = make(model)
    run(guard, model, batches[:done])
    twin_model, twin = copied((model, guard))
    assert twin_model is not model and twin.param_groups[0]["params"][0] is twin_model[0].weight
    state = torch.get_rng_state()
    run(guard, model, batches[done:])
    torch.set_rng_state(state)
    run(twin, twin_model, batches[done:])
    assert_same_state(twin_model.state_dict(), model.state_dict())
    assert repr(twin.history) == repr(guard.history) and len(guard.history) > 1


def test_the_groups_are_the_fallbacks():
    model = mlp()
    guard = LossGuard(Adam(model.parameters()), SGD(model.parameters(), lr=0.1), nt=1, nc=1)
    assert isinstance(guard, Optimizer)
    assert guard.param_groups is guard.fallback.param_groups
    assert guard.state is guard.fallback.state
    scheduler = StepLR(guard, 1, gamma=0.5)
    run(guard, model, [spiral()])
    scheduler.step()
    assert guard.fallback.param_groups[0]["lr"] == pytest.approx(0.05)
    assert guard.learned.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_schedulers_of_the_guard_advance_by_nt():
    weight, closure = quadratic()
    learned, fallback = SGD([weight], lr=1.0), SGD([weight], lr=0.1)
    seen = LambdaLR(fallback, lambda t: 1 / (t + 1))
    guard = LossGuard(learned, fallback, nt=3, nc=2, schedulers=[seen], loser="reset")
    for _ in range(10):
        guard.step(closure)
    assert seen.last_epoch == 6
    assert fallback.param_groups[0]["lr"] == pytest.approx(0.1 / 7)


@pytest.mark.parametrize("tensor", [False, True])
def test_every_lane_sees_the_same_rates(tensor):
    """A cycle of z and s, off the fallback's own path, with rates that change at every step."""
    seen = []

    class Watched(SGD):
        def step(self, closure=None):
            seen.append(float(self.param_groups[0]["lr"]))
            return super().step(closure)

    weight, closure = quadratic()
    lr = torch.tensor(0.1) if tensor else 0.1
    fallback = Watched([weight], lr=lr, foreach=False)
    guard = LossGuard(
        SGD([weight], lr=0.3),
        fallback,
        nt=3,
        nc=1,
        hedge=True,
        schedulers=[LambdaLR(fallback, lambda t: 0.5**t)],
    )
    for _ in range(2):
        guard.cycle(lambda batch: weight.square().sum(), [1, 2, 3], [4])
        assert guard.last_decision.winner == 0
    rates = [0.1 * 0.5**t for t in range(7)]
    assert seen == pytest.approx(rates[:3] + 2 * rates[3:6])
    assert float(fallback.param_groups[0]["lr"]) == pytest.approx(rates[6])
    seen.clear()
    for _ in range(3):
        guard.step(closure)
    assert len(seen) == 6 and seen[::2] == seen[1::2]


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (partial(LossGuard, nt=1, nc=1), ["learned", "fallback"]),
        (partial(BestOf, nt=1), ["learned", "fallback"]),
        (ResidualGuard, ["fallback", "learned", "fallback"]),
    ],
)
def test_hooks_are_called(kind, steps):
    model = mlp()
    guard = kind(Adam(model.parameters()), SGD(model.parameters()))
    calls = []
    guard.register_step_pre_hook(lambda *_: calls.append("pre"))
    guard.register_step_post_hook(lambda *_: calls.append("post"))
    guard.fallback.register_step_post_hook(lambda *_: calls.append("fallback"))
    guard.learned.register_step_post_hook(lambda *_: calls.append("learned"))
    guard.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    guard.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    guard.register_load_state_dict_pre_hook(lambda _, state: calls.append(state.pop("mine")))
    guard.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    run(guard, model, [spiral()])
    guard.load_state_dict(guard.state_dict())
    assert calls == ["pre", *steps, "post", "save", 1, "loaded"]


@pytest.mark.parametrize("hedge", [False, True, "only"])
def test_groups_can_be_added_between_cycles(hedge):
    first, second = nn.Linear(2, 8), nn.Linear(8, 2)
    model = nn.Sequential(first, nn.BatchNorm1d(8), second)
    guard = LossGuard(
        Adam(first.parameters(), lr=0.1),
        SGD(first.parameters(), lr=0.1, momentum=0.9),
        nt=2,
        nc=1,
        model=model,
        hedge=hedge,
        loser="reset",
    )
    run(guard, model, [spiral() for _ in range(3)])
    before = second.weight.detach().clone()
    guard.add_param_group({"params": second.parameters(), "lr": 0.02})
    assert [group["lr"] for group in guard.fallback.param_groups] == [0.1, 0.02]
    assert [group["lr"] for group in guard.learned.param_groups] == [0.1, 0.1]
    run(guard, model, [spiral() for _ in range(6)])
    assert not torch.equal(second.weight, before)
    with pytest.raises(ValueError) as error:
        run(guard, model, [spiral()])
        guard.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert str(error.value) == (
        "param_group must be added between cycles, got one after 1 minibatches of one"
    )


def test_an_adapter_for_optimizers_that_want_the_loss():
    class WantsLoss(SGD):
        def step(self, loss):
            assert isinstance(loss, torch.Tensor)
            super().step()

    def runs(learned):
        model = copy.deepcopy(start)
        guard = LossGuard(learned(model), Adam(model.parameters(), lr=0.01), nt=3, nc=2)
        run(guard, model, batches)
        return model.state_dict(), guard.history

    start, batches = mlp(), [spiral() for _ in range(20)]
    adapted, history = runs(lambda model: LossStep(WantsLoss(model.parameters(), lr=0.5)))
    plain, expected = runs(lambda model: SGD(model.parameters(), lr=0.5))
    assert_same_state(adapted, plain)
    assert history == expected


def test_numpys_numbers_are_numbers():
    """And a state_dict holds plain ones none the less."""
    two, half = np.int64(2), np.float64(0.5)
    model = mlp()
    learned, fallback = Adam(model.parameters(), lr=3.0), SGD(model.parameters(), lr=0.1)
    criterion, probing = sequential_criterion(first=two, most=two), backoff(patience=1, most=two)
    guard = LossGuard(
        learned,
        fallback,
        nt=two,
        nc=two,
        hedge=track_record(decay=half, share=half),
        criterion=criterion,
        probing=probing,
        ratchet=ratchet(cycles=two, tolerance=half),
    )
    run(guard, model, [spiral() for _ in range(12)])
    assert max(guard.state_dict()["guard"]["probes"]) == 2
    others = ResidualGuard(learned, fallback, nt=two, alpha=half, sequence=ema(half))
    run(others, model, [spiral() for _ in range(3)])
    for saved in (guard.state_dict(), others.state_dict()):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        torch.load(file, weights_only=True)


def test_what_optimizers_knew_before_the_guard_was_built_is_saved():
    """A loser is reset to it, also after the guard was built anew on new optimizers."""

    def build(warm):
        weight = torch.tensor([4.0, 2.0], requires_grad=True)
        learned, fallback = Adam([weight], lr=0.5), SGD([weight], lr=0.05, momentum=0.9)

        def closure():
            weight.grad = None
            loss = weight.square().sum()
            loss.backward()
            return loss

        for optimizer in (learned, fallback) if warm else ():
            optimizer.step(closure)
        weight.grad = None
        return weight, LossGuard(learned, fallback, nt=2, nc=1, loser="reset"), closure

    weight, guard, closure = build(True)
    for _ in range(9):
        guard.step(closure)
    other_weight, other, other_closure = build(False)
    other.load_state_dict(guard.state_dict())
    for _ in range(21):
        guard.step(closure)
        other.step(other_closure)
    assert {decision.winner for decision in guard.history} == {0, 1}
    assert repr(guard.history) == repr(other.history) and torch.equal(weight, other_weight)


def test_losses_may_be_numbers():
    """Of double precision, as Python's are."""
    weight, _ = quadratic()
    guard = LossGuard(SGD([weight], lr=0.1), SGD([weight], lr=0.1), nt=1, nc=1)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert guard.step(closure) == 16.0
    assert isinstance(guard.step(closure), float)

    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    guard = LossGuard(SGD([w], lr=2e8), SGD([w], lr=1e8), nt=1, nc=1)

    def nearly_constant():
        loss = 1 + 1e-9 * w.square().sum()
        loss.backward()
        return loss.item()

    for _ in range(2):
        guard.step(nearly_constant)
    assert guard.last_decision.winner == 0


def test_jax_is_not_imported():
    code = "import sys, lossguard.torch; sys.exit('jax' in sys.modules or 'optax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_history_is_a_table():
    polars = pytest.importorskip("polars")
    model = mlp()
    guard = LossGuard(Adam(model.parameters()), SGD(model.parameters()), nt=3, nc=2)
    run(guard, model, [spiral() for _ in range(15)])
    table = polars.DataFrame(guard.history)
    assert table.columns == list(guard.history[0]._fields)
    assert table["winner"].to_list() == [d.winner for d in guard.history]
    assert table["losses"].to_list() == [d.losses for d in guard.history]


def test_closures_know_the_phase():
    weight, closure = quadratic()
    guard = LossGuard(SGD([weight], lr=0.1), SGD([weight], lr=0.1), nt=2, nc=1)
    seen = []

    def watching():
        seen.append((guard.checking, torch.is_grad_enabled()))
        return closure()

    for _ in range(3):
        guard.step(watching)
    assert seen == [(False, True)] * 4 + [(True, False)] * 2
    assert weight.grad is None


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_groups_can_be_added_whichever_way_lanes_get_in(offload):
    w, v = (torch.full((1,), 4.0, requires_grad=True) for _ in range(2))
    guard = LossGuard(SGD([w], lr=0.4), SGD([w], lr=0.1), nt=1, nc=1, offload=offload)
    guard.add_param_group({"params": [v]})
    closure = squares(w, v)
    for _ in range(2):
        guard.step(closure)
    assert w.item() == pytest.approx(0.8) == v.item()
