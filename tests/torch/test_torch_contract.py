"""The guards keep the contract of ``torch.optim.Optimizer``."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from models import (
    KINDS,
    TWO,
    assert_is_algorithm2,
    assert_resumes,
    assert_same_state,
    backward,
    closure_for,
    loss_fn,
    minibatches,
    mlp,
    quadratic,
    refusals_of_damaged,
    run,
    spiral,
    step_by,
    two,
)
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from lossguard.torch import BestOf, Hedged, LossGuard, Recommended, ResidualGuard

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
    yield pytest.param("AdamW", {"lr": torch.tensor(1e-3)}, id="AdamW-tensor-rate")


def matrices():
    """A model whose parameters are all matrices, which is all that Muon takes."""
    return nn.Sequential(nn.Linear(2, 16, bias=False), nn.Tanh(), nn.Linear(16, 2, bias=False))


@pytest.mark.parametrize(("name", "options"), list(variants()))
@pytest.mark.parametrize(("side", "loser"), [("learned", "reset"), ("fallback", "keep")])
def test_every_optimizer_on_either_side(name, options, side, loser):
    def tested(params):
        return getattr(torch.optim, name)(params, **options)

    makers = (tested, lambda ps: SGD(ps, lr=0.05))
    model = matrices() if name == "Muon" else mlp()
    batches = [spiral() for _ in range(25)]
    assert_is_algorithm2(
        model, *makers[:: 1 if side == "learned" else -1], batches, nt=3, nc=2, loser=loser
    )


def test_sparse_gradients():
    embedding = nn.Embedding(8, 2, sparse=True)
    guard = two(
        LossGuard, embedding, lambda ps: torch.optim.SparseAdam(ps, lr=0.1),
        lambda ps: SGD(ps, lr=0.1), nt=3, nc=2,
    )  # fmt: skip
    for _ in range(10):
        guard.step(lambda: backward(embedding(torch.tensor([1, 2])).square().sum()))
    assert {d.winner for d in guard.history} == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [0, 1, 4, 9, 33])
def test_resumes_bit_by_bit_at_any_point_of_a_cycle(kind, done):
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.2))
    options = {LossGuard: {"nc": 2}, ResidualGuard: {}}.get(kind, {"share": 0.5})
    history = assert_resumes(lambda m: two(kind, m, nt=4, **options), model, minibatches(), done)
    assert len(history) >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_shares_nothing_with_the_guard(kind):
    model = mlp()
    guard = two(kind, model, nt=3)
    run(guard, model, minibatches(4))
    saved = guard.state_dict()
    before = copy.deepcopy(saved)
    run(guard, model, minibatches(4))
    assert_same_state(saved, before)
    guard.load_state_dict(saved)
    run(guard, model, minibatches(4))
    assert_same_state(saved, before)


def test_a_state_is_of_plain_tensors_by_parameter():
    model = mlp()
    guard = two(Recommended, model, nt=3)
    run(guard, model, minibatches(4))
    state = guard.state_dict()["state"]
    assert list(state) == [0, 1, 2, 3]
    for p, entries in zip(model.parameters(), state.values(), strict=True):
        assert all(isinstance(value, torch.Tensor) for value in entries.values())
        for name in ("y.value", "z.value", "s.value", "y.memory.exp_avg"):
            assert entries[name].shape == p.shape


def test_loading_keeps_the_dtype_of_states():
    class Precise(SGD):
        """Keeps its momentum in single precision, beside a count and a list, as SOAP does."""

        def step(self, closure=None):
            loss = closure() if closure else None
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    state = self.state[p]
                    state.setdefault("m", torch.zeros_like(p, dtype=torch.float32))
                    state.setdefault("all", [torch.zeros(2), None, "text"])
                    state["m"].mul_(0.9).add_(p.grad.float())
                    state["all"][0] += 0.1
                    p.sub_(0.1 * state["m"].to(p.dtype))
            return loss

    model = mlp().bfloat16()
    batches = [(x.bfloat16(), labels) for x, labels in minibatches(30)]
    assert_resumes(
        lambda m: two(Recommended, m, lambda ps: Precise(ps, lr=0.1), nt=4), model, batches, 13
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_state_of_its_own_is_refused_whole(kind):
    model = mlp()
    guard = two(kind, model, nt=3)
    run(guard, model, minibatches(4))
    before = guard.state_dict()
    other = two(kind, nn.Linear(2, 2), nt=3)
    wide = two(kind, nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), nt=3)
    normed = two(kind, mlp(nn.BatchNorm1d(16, affine=False)), nt=3)
    foreign = two(LossGuard if kind is not LossGuard else Hedged, mlp(), nt=3)
    longer = two(kind, mlp(), nt=4)
    another = two(kind, mlp(), AdamW, nt=3)
    broken = copy.deepcopy(before)
    name = f"{next(iter(guard._lanes))}.value"
    del broken["state"][3][name]
    missing = copy.deepcopy(before)
    missing["param_groups"][0]["guard"]["numbers"] = ["something else"]
    beyond = copy.deepcopy(before)
    beyond["param_groups"][0]["guard"]["numbers"][0] = 10**9
    refusals = [
        (other.state_dict(), "state_dict must be of 4 parameters in 1 groups"),
        (wide.state_dict(), "state_dict must be of the same model, with a tensor of shape"),
        (normed.state_dict(), "state_dict must be of the same model, with 0 buffers"),
        (foreign.state_dict(), rf"state_dict must be of a guard with {{'kind': '{kind.__name__}'"),
        (longer.state_dict(), "state_dict must be of a guard with .*'nt': 3.* got .*'nt': 4"),
        (another.state_dict(), "state_dict must be of a guard with .*'Adam'.* got .*'AdamW'"),
        (SGD(model.parameters()).state_dict(), "state_dict must be of a .* before the guard is"),
        (broken, f"state_dict must hold {name} of each parameter"),
        (missing, "state_dict must have the numbers of"),
        (beyond, "phase must be at most"),
    ]
    for state, message in refusals:
        with pytest.raises(ValueError, match=f"^{message}"):
            guard.load_state_dict(state)
        assert_same_state(guard.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_state_is_loaded_whole_or_not_at_all(kind):
    model = mlp(nn.BatchNorm1d(16))
    guard = two(kind, model, nt=3)
    run(guard, model, minibatches(4))
    before = guard.state_dict()
    run(guard, model, minibatches(4))
    assert refusals_of_damaged(guard, before) > 80


def test_lengths_of_a_cycle_are_plain_numbers():
    """NumPy's carry a type that ``torch.load`` refuses."""
    guard = two(LossGuard, mlp(), nt=np.int64(2), nc=np.int64(1))
    assert type(guard.nt) is type(guard.nc) is int


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied):
    with pytest.raises(
        ValueError, match=r"^a Recommended can't be copied or pickled: .* state_dict"
    ):
        copied(two(Recommended, mlp()))


def test_one_schedule_drives_both_in_proportion():
    model = mlp()
    guard = two(Recommended, model, nt=2)
    fallback, learned = (inner.optimizer for inner in guard._inners.values())
    scheduler = LambdaLR(guard, lambda t: min(1, t / 4))  # a warm-up from 0
    seen = []
    for batch in minibatches(6):
        guard.step(closure_for(guard, model, batch))
        seen.append((learned.param_groups[0]["lr"], fallback.param_groups[0]["lr"]))
        scheduler.step()
    factors = [0, 0.25, 0.5, 0.75, 1, 1]
    assert seen == [pytest.approx((0.05 * f, 0.3 * f)) for f in factors]


def test_one_schedule_drives_all_rates_of_a_function():
    weight, closure = quadratic(1.0)
    rates = [torch.tensor(0.1), torch.tensor(0.4)]
    guard = BestOf(lambda rate: AdamW([weight], lr=rate), rates=rates, model=None, nt=1)
    guard.param_groups[0]["lr"] = 0.05
    guard.step(closure)
    assert [float(rate) for rate in rates] == pytest.approx([0.05, 0.2])  # the tensors themselves


@pytest.mark.parametrize("first", ["guard", "schedulers"])
def test_each_may_have_a_schedule_of_its_own(first):
    """Built before the guard, or after it: a scheduler wraps its optimizer's step."""
    model = mlp()
    optimizers = [SGD(model.parameters(), lr=0.3), Adam(model.parameters(), lr=0.05)]

    def schedules():
        pairs = zip(optimizers, (0.5, 0.1), strict=True)
        return [StepLR(one, 1, gamma) for one, gamma in pairs]

    schedulers = schedules() if first == "schedulers" else []
    guard = BestOf(optimizers, model=model, nt=2)
    schedulers = schedulers or schedules()
    for batch in minibatches(2):
        guard.step(closure_for(guard, model, batch))
        for scheduler in schedulers:
            scheduler.step()
    rates = [one.param_groups[0]["lr"] for one in optimizers]
    assert rates == pytest.approx([0.3 * 0.25, 0.05 * 0.01])
    guard.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"^rates must be set in the guard's groups or in its opt"):
        guard.step(closure_for(guard, model, spiral()))


def test_other_options_are_handed_on_to_who_has_them():
    model = mlp()
    guard = two(Recommended, model, lambda ps: Adam(ps, lr=0.1, weight_decay=0.1))
    OneCycleLR(guard, max_lr=0.3, total_steps=10)  # of momentum too, which Adam hasn't
    guard.param_groups[0]["weight_decay"] = 0.5
    guard.step(closure_for(guard, model, spiral()))
    fallback, learned = (inner.optimizer.param_groups[0] for inner in guard._inners.values())
    assert learned["weight_decay"] == fallback["weight_decay"] == 0.5
    assert fallback["momentum"] == 0.95 and "momentum" not in learned
    assert fallback["lr"] == pytest.approx(0.3 / 25)
    assert learned["lr"] == pytest.approx(0.1 / 25)


def test_a_rate_that_was_0_and_groups_out_of_proportion_are_refused():
    model = mlp()
    guard = two(Recommended, model, fallback=lambda ps: SGD(ps, lr=0.0))
    guard.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"^rates must be positive when the guard is built"):
        guard.step(closure_for(guard, model, spiral()))

    def split(ps):
        return SGD([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.2}], lr=0.1)

    guard = two(Recommended, model, fallback=split)
    guard.param_groups[0]["lr"], guard.param_groups[1]["lr"] = 0.01, 0.02
    guard.step(closure_for(guard, model, spiral()))  # both a tenth
    assert [*guard._inners.values()][1].optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    guard.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"^rates of the guard's groups must change in proportion"):
        guard.step(closure_for(guard, model, spiral()))


def test_an_optimizer_may_find_its_rate_by_itself():
    """As Adafactor of transformers, whose rate is None: no schedule drives it, which is told."""

    class Own(SGD):
        def step(self, closure=None):
            self.param_groups[0]["lr"] = 0.1
            super().step(closure)
            self.param_groups[0]["lr"] = None

    def own(ps):
        optimizer = Own(ps, lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    model = mlp()
    guard = two(Recommended, model, own, nt=2)
    run(guard, model, minibatches(4))
    guard.param_groups[0]["lr"] = 0.1
    with pytest.warns(RuntimeWarning, match="an optimizer without lr isn't driven by the"):
        guard.step(closure_for(guard, model, spiral()))


def test_a_schedule_is_resumed():
    model, twin = mlp(), mlp()
    guard, other = two(Recommended, model, nt=2), two(Recommended, twin, nt=2)
    guard.param_groups[0]["lr"] = 0.15
    guard.step(closure_for(guard, model, spiral()))
    guard.param_groups[0]["lr"] = 0.1  # as a scheduler does after the step
    other.load_state_dict(guard.state_dict())
    assert [*other._inners.values()][1].optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 3)
    for one, its_model in ((guard, model), (other, twin)):
        one.param_groups[0]["lr"] = 0.03
        one.step(closure_for(one, its_model, spiral()))
        assert [*one._inners.values()][1].optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_called(kind):
    model, calls = mlp(), []
    guard = two(kind, model, nt=2)
    guard.register_step_pre_hook(lambda *_: calls.append("before step"))
    guard.register_step_post_hook(lambda *_: calls.append("after step"))
    guard.register_state_dict_pre_hook(lambda *_: calls.append("before save"))
    guard.register_state_dict_post_hook(lambda _, saved: calls.append(sorted(saved)))
    guard.register_load_state_dict_pre_hook(lambda *_: calls.append("before load"))
    guard.register_load_state_dict_post_hook(lambda *_: calls.append("after load"))
    guard.step(closure_for(guard, model, spiral()))
    guard.load_state_dict(guard.state_dict())
    assert calls == [
        "before step", "after step", "before save", ["param_groups", "state"], "before load",
        "after load",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_history_is_bounded_and_not_saved(kind):
    weight, closure = quadratic(1.0)
    optimizers = SGD([weight], lr=0.01), SGD([weight], lr=0.001)
    options = {"nc": 1} if kind is LossGuard else {}
    args = [optimizers] if kind is BestOf else optimizers
    guard = kind(*args, model=None, nt=1, **options)
    assert guard.history.maxlen == 1000
    for _ in range(100 if kind is not BestOf else 1100):
        guard.step(closure)
    assert len(guard.history) in (50, 100, 1000)
    file = io.BytesIO()
    torch.save(guard.state_dict(), file)
    assert file.tell() < 12_000


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_garbage_collector(kind):
    """Published training scripts switch it off; what is left for it are copies of a model."""
    model = mlp()
    guard = two(kind, model, nt=3)
    run(guard, model, minibatches(6))
    gc.collect()
    gc.disable()
    try:
        run(guard, model, minibatches(12))
        assert guard.state_dict()
        assert gc.collect() == 0
        (lane, *_) = (lane for lane in guard._lanes.values() if not lane.live)
        seen = weakref.ref(lane.values[0])
        guard.load_state_dict(guard.state_dict())
        assert seen() is None and gc.collect() == 0
    finally:
        gc.enable()


def test_the_guard_goes_with_its_last_reference_or_the_collector():
    model = mlp()
    guard = two(Recommended, model)
    seen = weakref.ref(guard)
    del guard
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("kind", TWO)
def test_bodies_of_a_loop_do_what_closures_do(kind):
    models = [mlp(nn.BatchNorm1d(16), nn.Dropout(0.2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    guards = [two(kind, model, nt=3) for model in models]
    for batch in minibatches(30):
        torch.manual_seed(1)
        returned = guards[0].step(closure_for(guards[0], models[0], batch))
        torch.manual_seed(1)
        for lane in guards[1].lanes():
            loss = backward(loss_fn(models[1], batch))
            lane.step(loss)
        assert torch.equal(returned, loss)  # of the live lane, which is the last
    assert_same_state(models[1].state_dict(), models[0].state_dict())
    assert [*guards[0].history] == [*guards[1].history] or repr(guards[0].history) == repr(
        guards[1].history
    )


def test_accumulation_and_clipping_in_a_body():
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    guard = two(Recommended, model, fallback=lambda ps: SGD(ps, lr=0.5), nt=10)
    alone = SGD(twin.parameters(), lr=0.5)
    guard._relay.share = 0.0
    for x, labels in minibatches(30):
        halves = [(x[:8], labels[:8]), (x[8:], labels[8:])]
        for lane in guard.lanes():
            total = 0.0
            for half in halves:
                loss = loss_fn(model, half) / 2
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            lane.step(total)
        alone.zero_grad()
        for half in halves:
            (loss_fn(twin, half) / 2).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        alone.step()
    assert [decision.gradients for decision in guard.history] == [20, 20, 10]  # a trial of 20 steps
    assert {decision.winner for decision in guard.history} == {2}
    assert_same_state(model.state_dict(), twin.state_dict())


def test_optimizers_with_other_conventions_of_step():
    """``step()`` as public Muons have, and ``step(loss)`` as learned optimizers have."""

    class Plain(SGD):
        def step(self):
            super().step()

    class Polyak(SGD):
        def step(self, loss):
            square = sum(p.grad.square().sum() for p in self.param_groups[0]["params"])
            self.param_groups[0]["lr"] = (loss / square).item()
            super().step()

    weight, closure = quadratic(3.0)
    guard = BestOf([Plain([weight], lr=0.1), Polyak([weight], lr=1.0)], model=None, nt=1)
    guard.step(closure)
    guard.step(closure)
    assert guard.last_decision.winner == 1 and weight.item() == pytest.approx(3 / 4)
    for lane in guard.lanes():
        lane.step(closure())
    assert weight.item() == pytest.approx(3 / 8)


def test_an_optimizer_that_needs_a_closure_is_refused():
    """It may evaluate again, with gradients that a loop's body would have clipped."""

    class Twice(SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    weight, _ = quadratic(3.0)
    for one, signature in (
        (Twice([weight]), "Twice with step"),
        (LBFGS([weight]), "LBFGS with st"),
    ):
        with pytest.raises(
            ValueError, match=rf"^optimizers\[0\] must have step\(\), .* {signature}"
        ):
            BestOf([one], model=None)


def test_a_running_job_can_be_put_under_a_guard():
    """What its optimizer remembers stays, and is what the guard resets it to."""
    model = mlp()
    fallback = AdamW(model.parameters(), lr=0.01)
    for batch in minibatches(5):
        step_by(fallback, loss_fn(model, batch))
    fallback.zero_grad()
    guard = Recommended(SGD(model.parameters(), lr=1e-9), fallback, model=model)
    run(guard, model, minibatches(20))
    assert guard.last_decision.winner == 2
    steps = {state["step"].item() for state in fallback.state.values()}
    assert steps == {25.0}


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_may_make_its_memory_when_it_is_built(kind):
    """A guard that has it begin again sets it to that."""

    class Ready(SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            for p in self.param_groups[0]["params"]:
                self.state[p]["m"] = torch.zeros_like(p)

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                self.state[p]["m"].mul_(0.5).add_(p.grad)
                p.sub_(0.1 * self.state[p]["m"])

    model = mlp()
    options = {LossGuard: {"nc": 1, "loser": "reset"}}.get(kind, {})
    guard = two(kind, model, lambda ps: Ready(ps), lambda ps: Ready(ps), nt=2, **options)
    run(guard, model, minibatches(20))
    (lane, *_) = guard._lanes.values()
    lane.forget()
    assert all(not state["m"].any() for state in lane.memory().state.values())
    run(guard, model, minibatches(3))
    assert len(guard.history) >= 7


def test_a_schedule_drives_an_optimizer_that_was_loaded_later_and_skips_empty_groups():
    """Which has other dictionaries for its groups then."""
    model = nn.Linear(2, 2, bias=False)
    groups = [{"params": [model.weight]}, {"params": [], "weight_decay": 0.0}]
    optimizers = [AdamW([dict(group) for group in groups], lr=rate) for rate in (0.4, 0.1)]
    guard = Recommended(*optimizers, model=model)
    for one in optimizers:
        one.load_state_dict(one.state_dict())
    guard.param_groups[0]["lr"] = 0.05
    guard.step(closure_for(guard, model, spiral()))
    rates = [one.param_groups[0]["lr"] for one in optimizers]
    assert rates == pytest.approx([0.2, 0.05])


def test_an_optimizer_that_remembers_nothing_is_resumed():
    """Though it has asked for an entry of its state."""

    class Signs(SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                assert self.state[p] == {}
                p.data.sub_(0.01 * p.grad.sign())

    assert_resumes(
        lambda m: two(Recommended, m, lambda ps: Signs(ps), nt=2), mlp(), minibatches(9), 4
    )
