"""``Rewind`` in PyTorch's loops: what it promises, schedulers, checkpoints, and that it helps."""

import copy
import math
import signal

import numpy as np
import pytest
import torch
from models import loss_fn, minibatches, mlp, refusals_of_damaged
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lossguard.torch import Rewind, RewindEvent
from lossguard.torch.tensors import leaves, zero_unsound

FALLS = list(np.linspace(3, 1, 128))
HIGH = [9.0] * 16
WINDOW = 64


def one_weight(optimizer=torch.optim.SGD, **settings):
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model, optimizer(model.parameters(), **{"lr": 1.0} | settings)


def drive(rewind, model, optimizer, losses, gradient=1.0, after=lambda: None):
    for loss in losses:
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        after()
        rewind.observe(loss)


def test_it_goes_back_and_says_so():
    model, optimizer = one_weight(momentum=0.5)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS[:112])
    momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
    weight = model.weight.clone()
    drive(rewind, model, optimizer, FALLS[112:])
    drive(rewind, model, optimizer, HIGH[:7])
    assert not rewind.events
    drive(rewind, model, optimizer, HIGH[:1])
    assert rewind.events == [RewindEvent("return", "loss", 136, 24, 1, 0.5)]
    assert model.weight == weight
    assert optimizer.state[model.weight]["momentum_buffer"] == momentum
    assert rewind.thrown == 24 and rewind.returns == 1
    for call in range(32):
        assert rewind.scale == min(1.0, 0.5 + 0.5 * call / 16)  # between two reads as well
        drive(rewind, model, optimizer, [1.0])


@pytest.mark.usefixtures("as_ctrl_c")
def test_ctrl_c_waits_until_it_is_back():
    class Interrupts:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            signal.raise_signal(signal.SIGINT)

    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer, schedulers=[Interrupts()], window=WINDOW, every=4)
    with pytest.raises(KeyboardInterrupt):
        drive(rewind, model, optimizer, FALLS + HIGH)
    assert model.weight == -112 and rewind.thrown == 24 and len(rewind.events) == 1


def test_before_the_first_step_there_is_no_memory():
    model, optimizer = one_weight(torch.optim.Adam)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, [math.nan] * 8, gradient=math.inf)
    assert rewind.returns == 1 and rewind.skipped == 7
    assert model.weight == 0 and not optimizer.state[model.weight]


class Hostile(torch.optim.Optimizer):
    """Its steps are what a list says."""

    def __init__(self, params, steps):
        super().__init__(params, {"lr": 1.0})
        self.steps = iter(steps)

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param += self.param_groups[0]["lr"] * next(self.steps)


def hostile_run(seed, every, checks, steps=1200, rho=0.05):
    """The largest excess over the budget, and how often the model wasn't finite after a read."""
    rng = np.random.default_rng(seed)
    kind = ("broken", "saw", "rare", "all")[seed % 4]
    moves = rng.standard_normal(steps)
    values = rng.standard_normal(steps)
    if kind in ("broken", "all"):
        at = rng.random(steps) < (1.0 if kind == "all" else 0.1)
        moves[at] = rng.choice([np.nan, np.inf, -np.inf], at.sum())
    if kind == "saw":
        values += 100 * (np.arange(steps) % 60 >= 40)
    if kind == "rare":
        values[rng.random(steps) < 0.3] = np.nan
        moves[rng.random(steps) < 0.01] = np.nan
    model, _ = one_weight()
    optimizer = Hostile(model.parameters(), moves)
    rewind = Rewind(model, optimizer, window=WINDOW, every=every, rho=rho)
    excess, infinite = -math.inf, 0
    for value in values:
        optimizer.step()
        rewind.observe(value)
        excess = max(excess, rewind.thrown - rho * rewind.calls - WINDOW)
        infinite += not rewind._unread and not bool(model.weight.isfinite().all())
    checks.append((rewind.returns, rewind.skipped, rewind.thrown))
    return excess, infinite


@pytest.mark.parametrize("every", [1, 4, 16])
def test_in_every_run_it_is_finite_and_throws_away_no_more_than_it_may(every):
    seen = []
    for seed in range(4):
        excess, infinite = hostile_run(seed, every, seen)
        assert excess <= 0 and infinite == 0, seed
    assert np.max(seen, axis=0)[2] > WINDOW and (np.max(seen, axis=0) > 0).all()


def test_where_no_step_is_finite_none_is_taken():
    """Three returns throw 4 steps away each; then each step is taken back by itself, and skipped.

    After 8 of these there is an alarm, and what was known of the losses is forgotten.
    """
    model, _ = one_weight()
    optimizer = Hostile(model.parameters(), [math.nan] * 400)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    for _ in range(400):
        optimizer.step()
        rewind.observe(1.0)
    assert model.weight == 0 and rewind.scale == 0.5**6
    events = rewind.events
    assert [(event.call, event.in_a_row) for event in events[:5]] == [
        *((4, 1), (8, 2), (12, 3)),
        *((20, 0), (24, 1)),
    ]
    thrown = 4 * sum(event.cause == "model" for event in events)
    alarms = sum(event.kind == "return" and event.cause == "loss" for event in events)
    assert rewind.thrown == thrown and rewind.skipped == 400 - thrown - alarms


def test_that_test_fails_where_the_budget_is_broken(monkeypatch):
    allowance = property(lambda self: self.window + self.calls)
    monkeypatch.setattr("lossguard.torch.rule.Rule.allowance", allowance)
    assert max(hostile_run(seed, 4, [])[0] for seed in range(4)) > 0


def test_gradients_that_are_not_finite_move_nothing():
    model, optimizer = one_weight(torch.optim.AdamW, weight_decay=0.0)
    rewind = Rewind(model, optimizer, every=4, window=WINDOW)
    rng = np.random.default_rng(0)
    for i in range(200):
        bad = rng.random() < 0.2
        model.weight.grad = torch.full_like(model.weight, math.nan if bad else 0.1)
        optimizer.step()
        rewind.observe(3.0 - i / 100)
        assert model.weight.isfinite().all()
    assert rewind.skipped > 20 and rewind.returns == 0


def test_a_memory_that_is_not_finite_goes_back_with_the_model():
    model, optimizer = network()
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    train(model, optimizer, rewind, 0, 90)
    next(iter(optimizer.state.values()))["exp_avg"].fill_(math.nan)
    train(model, optimizer, rewind, 90, 92)
    assert [event.cause for event in rewind.events] == ["model"]
    train(model, optimizer, rewind, 92, 120)
    assert rewind.returns == 1
    for state in optimizer.state.values():
        assert state["exp_avg"].isfinite().all()


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.99**k),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 300),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=300),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 50),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.99), lr_scheduler.StepLR(o, 10, 0.9)]
    ),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("schedule", [*SCHEDULES, "by hand"])
def test_the_schedule_goes_on_and_the_steps_are_scaled(schedule, tensor):
    """Between steps the rates are the schedule's own; what the steps add up to is scaled."""

    def rates(guarded):
        model, optimizer = one_weight(torch.optim.Adam, lr=0.5)
        if tensor:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        the_one = optimizer.param_groups[0]["lr"]
        scheduler = None if schedule == "by hand" else SCHEDULES[schedule](optimizer)
        rewind = Rewind(model, optimizer, window=WINDOW, every=4) if guarded else None
        between, used, scales = [], [], []
        optimizer.register_step_pre_hook(lambda o, *_: used.append(float(o.param_groups[0]["lr"])))
        for i, loss in enumerate([*FALLS, *HIGH[:8], *([1.0] * 100)]):
            scales.append(rewind.scale if rewind else 1.0)
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
            if scheduler:
                scheduler.step()
            else:
                for group in optimizer.param_groups:
                    group["lr"] = 0.5 / (1 + i)
            between.append(float(optimizer.param_groups[0]["lr"]))
            if rewind:
                rewind.observe(loss)
        return between, used, scales, optimizer.param_groups[0]["lr"] is the_one

    plain, guarded = rates(False), rates(True)
    assert guarded[0] == plain[0] and guarded[3] == plain[3]
    assert min(guarded[2]) == 0.5 and guarded[2][0] == guarded[2][-1] == 1
    np.testing.assert_allclose(guarded[1], np.multiply(plain[1], guarded[2]), rtol=1e-6)


def test_a_scheduler_that_is_named_goes_back():
    model, optimizer = one_weight()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    rewind = Rewind(model, optimizer, schedulers=[scheduler], window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS + HIGH[:8], after=scheduler.step)
    assert rewind.returns == 1 and scheduler.last_epoch == 112
    expected = 0.5 * (1 + math.cos(math.pi * 112 / 1000))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("offload", [False, True])
def test_two_optimizers_of_a_model_are_rewound_as_one_of_two_groups_is(offload):
    runs = []
    for split in (False, True):
        torch.manual_seed(0)
        model = mlp()
        parts = [
            {"params": [*layer.parameters()], "lr": rate}
            for layer, rate in ((model[0], 0.01), (model[2], 0.003))
        ]
        groups = [[part] for part in parts] if split else [parts]
        optimizers = [torch.optim.AdamW(group) for group in groups]
        schedulers = [lr_scheduler.ExponentialLR(one, 0.999) for one in optimizers]
        rewind = Rewind(
            model,
            optimizers if split else optimizers[0],
            schedulers=schedulers,
            window=WINDOW,
            every=4,
            offload=offload,
        )
        numbers = []
        for call, batch in enumerate(minibatches(260)):
            loss = loss_fn(model, batch) * (50 if 150 <= call < 190 else 1)
            loss.backward()
            if call == 100:
                for p in model.parameters():
                    p.grad.fill_(math.nan)
            for one in (*optimizers, *schedulers):
                one.step()
            for one in optimizers:
                one.zero_grad()
            rewind.observe(loss)
            numbers.append((loss.item(), rewind.scale, schedulers[0].last_epoch))
            numbers.append([group["lr"] for one in optimizers for group in one.param_groups])
        assert rewind.returns >= 1 and rewind.skipped == 1
        saved = rewind.state_dict()
        runs.append((numbers, rewind.events, saved["trusted"]["model"], [*model.parameters()]))
    assert runs[0][:2] == runs[1][:2]
    for ours, theirs in zip(leaves(runs[0][2:]), leaves(runs[1][2:]), strict=True):
        assert torch.equal(ours, theirs)


def test_an_error_within_one_of_two_optimizers_leaves_the_rates_of_both():
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2)))
    optimizers = [
        torch.optim.SGD(one.parameters(), lr=lr) for one, lr in zip(model, (1.0, 0.5), strict=True)
    ]
    rewind = Rewind(model, optimizers, window=WINDOW, every=4)
    for loss in FALLS + HIGH[:8]:
        for one in optimizers:
            one.step()
        rewind.observe(loss)
    assert rewind.scale == 0.5

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizers[0].step(closure)
    optimizers[1].step()
    assert [one.param_groups[0]["lr"] for one in optimizers] == [1.0, 0.5]
    another = Rewind(model, optimizers[1])
    with pytest.raises(ValueError, match="Rewind must be open"):
        rewind.observe(1.0)
    another.observe(1.0)


def test_an_average_of_weights_that_is_named_goes_back():
    model, optimizer = one_weight()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    rewind = Rewind(model, optimizer, schedulers=[average], window=WINDOW, every=4)

    def update():
        average.update_parameters(model)

    drive(rewind, model, optimizer, FALLS[:112], after=update)
    before = copy.deepcopy(average.state_dict())
    drive(rewind, model, optimizer, FALLS[112:] + HIGH[:8], after=update)
    assert rewind.returns == 1 and model.weight.item() == -112
    for name, value in average.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_callback_may_make_the_optimizer_careful():
    """And may save: the event is over, with the model back and the scale lower."""
    model, optimizer = one_weight(momentum=0.5)
    heard = []

    def careful(event):
        assert rewind.events[-1] is event and rewind.scale == event.scale
        calls = rewind.state_dict()["rule"]["calls"]
        heard.append((event.kind, model.weight.item(), calls))
        for group in optimizer.param_groups:
            group["momentum"] = 0.0

    rewind = Rewind(model, optimizer, window=WINDOW, every=4, callback=careful)
    drive(rewind, model, optimizer, FALLS[:112])
    good = model.weight.item()
    drive(rewind, model, optimizer, FALLS[112:] + HIGH[:8])
    assert heard == [("return", good, 136)] and len(rewind.events) == 1
    drive(rewind, model, optimizer, [1.0])
    assert model.weight.item() == good - rewind._rule._factor


@pytest.mark.parametrize(("level", "events"), [(0.3, [("return", "audit", 128)]), (0.25, [])])
def test_an_audit_sees_what_the_losses_do_not(level, events):
    """A fifth of the progress from 1.0 to 0.1 is 0.18."""
    model, optimizer = one_weight()
    audits = iter([1.0, 0.5, 0.2, 0.1, *[level] * 100])
    rewind = Rewind(model, optimizer, window=WINDOW, every=4, audit=lambda: next(audits))
    drive(rewind, model, optimizer, [1.0] * 112)
    assert not rewind.events
    drive(rewind, model, optimizer, [1.0] * 16)
    assert [(e.kind, e.cause, e.call) for e in rewind.events] == events
    assert model.weight == (-64 if events else -128)


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer


def train(model, optimizer, rewind, first, last, fault=()):
    for i in range(first, last):
        rng = torch.Generator().manual_seed(i)
        x = torch.randn(32, 8, generator=rng).to(next(model.parameters()).device)
        t = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        loss = nn.functional.cross_entropy(model(x), t)
        optimizer.zero_grad()
        (loss * (-300 if i in fault else 1)).backward()
        optimizer.step()
        rewind.observe(loss * (20 if i in fault else 1))
    return loss.item()


def assert_same(one, other):
    for key, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def save(rewind, model, optimizer, tmp_path, how):
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    whole = {**whole, "rewind": rewind.state_dict()}
    if how == "torch":
        torch.save(whole, tmp_path / "state.pt")
        return
    from torch.distributed import checkpoint

    checkpoint.save({"rewind": whole.pop("rewind")}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    torch.save(whole, tmp_path / "state.pt")


def resume(rewind, model, optimizer, tmp_path, how):
    whole = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(whole["model"])
    optimizer.load_state_dict(whole["optimizer"])
    if how == "dcp":
        from torch.distributed import checkpoint

        whole["rewind"] = rewind.state_dict()
        state = {"rewind": whole["rewind"]}
        checkpoint.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
        whole["rewind"] = state["rewind"]
    rewind.load_state_dict(whole["rewind"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [3, 70, 137])
@pytest.mark.parametrize("how", ["torch", "dcp"])
def test_it_resumes_to_the_last_bit(tmp_path, how, at):
    options = {"window": WINDOW, "every": 8}
    fault = range(125, 140)

    def start(seed=0):
        model, optimizer = network(seed)
        return Rewind(model, optimizer, **options), model, optimizer

    rewind, model, optimizer = start()
    train(model, optimizer, rewind, 0, 200, fault)
    assert rewind.returns >= 1
    first, half, its_optimizer = start()
    train(half, its_optimizer, first, 0, at, fault)
    save(first, half, its_optimizer, tmp_path, how)
    again, twin, its_optimizer = start(seed=1)
    resume(again, twin, its_optimizer, tmp_path, how)
    assert again._trusted.keys() == first._trusted.keys()
    assert bool(first._trusted["optimizer"]) == (at > 64)
    train(twin, its_optimizer, again, at, 200, fault)
    assert_same(model, twin)
    assert again.scale == rewind.scale and again.thrown == rewind.thrown


def test_a_damaged_state_is_loaded_whole_or_not_at_all():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rewind = Rewind(model, optimizer, window=64, every=4)
    states = []
    for _ in range(2):
        for batch in minibatches(57):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            rewind.observe(loss.detach())
        states.append(rewind.state_dict())
    assert refusals_of_damaged(rewind, states[0]) > 30


def test_a_healthy_run_is_the_same_with_it():
    model, optimizer = network()
    rewind = Rewind(model, optimizer)
    train(model, optimizer, rewind, 0, 300)
    twin, its_optimizer = network()
    ignored = type("Ignored", (), {"observe": lambda self, loss: None})()
    train(twin, its_optimizer, ignored, 0, 300)
    assert_same(model, twin)
    assert not rewind.events and rewind.skipped == 0


def test_it_waits_for_the_device_at_reads_only(monkeypatch):
    model, optimizer = network()
    rewind = Rewind(model, optimizer, window=WINDOW, every=16)
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, real=real: (reads.append(1), real(self))[1]
        )
    found = 0
    for _ in range(64):
        optimizer.step()
        before = len(reads)
        rewind.observe(torch.tensor(1.0))
        found += len(reads) - before
    assert found == 4
    p = nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones_like(p)
    zero_unsound([p])  # in a step; there is nothing to read there


def test_inputs_that_are_not_finite_cost_no_more_than_their_steps(caplog):
    """BatchNorm's statistics are lost in the forward pass, before any gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    for call, (x, t) in enumerate(minibatches(128)):
        x = x.clone()
        x[0, 0] = math.nan if call in (50, 51, 90) else x[0, 0]
        loss = loss_fn(model, (x, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewind.observe(loss)
        if call % 4 == 3:
            assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    told = [RewindEvent("buffers", "model", call, 0, 0, 1.0) for call in (52, 92)]
    assert rewind.events == told and rewind.skipped == 3 and rewind.scale == 1
    assert [record.message for record in caplog.records] == [
        f"Rewind set back the buffers, which were not finite (cause: model, call {call})"
        for call in (52, 92)
    ]


def test_what_it_does_is_logged(caplog):
    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS + HIGH[:8])
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("lossguard.torch.rewind", "WARNING")
    assert record.message == (
        "Rewind threw 24 steps away and goes on at 0.5 of the rate (cause: loss, call 136)"
    )


@pytest.mark.parametrize(
    ("steps", "calls", "told"),
    [(0, 1, "16 calls for 0 steps"), (1, 2, "16 calls for 8"), (10, 1, "16 calls for 160 steps")],
)
def test_calls_and_steps_that_do_not_belong_together_are_told_once(steps, calls, told):
    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(64):
            for _ in range(steps):
                optimizer.step()
            for _ in range(calls):
                rewind.observe(1.0)
    (warning,) = caught
    assert str(warning.message).startswith("Rewind.observe must be called once after each opt")
    assert told in str(warning.message) and warning.filename == __file__


def test_no_call_at_all_is_told():
    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer)
    with pytest.warns(RuntimeWarning, match=r"got 0 calls for 256 steps$"):
        for _ in range(300):
            optimizer.step()
    assert rewind.calls == 0


def test_an_audit_may_set_the_model_to_evaluation():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(), nn.Dropout())
    model[2].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewind = Rewind(
        model, optimizer, window=WINDOW, every=4, audit=lambda: model.eval()(torch.ones(1))
    )
    for loss in FALLS:
        optimizer.step()
        rewind.observe(loss)
    assert [module.training for module in model] == [True, True, False]


def test_snapshots_take_two_copies():
    model, optimizer = network()
    rewind = Rewind(model, optimizer, window=WINDOW, every=16)
    train(model, optimizer, rewind, 0, 100)

    def size(saved):
        tensors = (value for value in leaves(saved) if isinstance(value, torch.Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    live = [*model.state_dict().values()]
    live += [t for entry in optimizer.state.values() for t in entry.values()]
    whole = sum(t.numel() * t.element_size() for t in live)
    assert size(rewind._trusted) == size(rewind._candidate) == whole and rewind._last is None

    def places():
        snapshots = (rewind._trusted, rewind._candidate)
        return {tensor.data_ptr() for one in snapshots for tensor in one["model"].values()}

    kept = places()
    train(model, optimizer, rewind, 100, 200)  # and the same memory is used again
    assert places() == kept


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_copies_elsewhere_change_nothing(device, where, tmp_path):
    runs = []
    for offload in (False, True if where == "host" else tmp_path):
        model, optimizer = network()
        model.to(device)
        model.register_buffer("empty", torch.ones(0, device=device))
        rewind = Rewind(model, optimizer, window=WINDOW, every=8, offload=offload)
        train(model, optimizer, rewind, 0, 200, range(125, 140))
        runs.append((model, rewind))
    (one, plain), (other, rewind) = runs
    assert_same(one, other)
    assert rewind.events == plain.events != []
    live = {t.data_ptr() for t in other.state_dict().values() if t.numel()}
    for saved in (rewind._trusted, rewind._candidate):
        tensors = (value for value in leaves(saved) if isinstance(value, torch.Tensor))
        copies = [t for t in tensors if t.numel()]
        assert len(copies) > 2 * len(live) and live.isdisjoint(t.data_ptr() for t in copies)
        assert all(t.device.type == "cpu" for t in copies)
        assert where == "disk" or device == "cpu" or any(t.is_pinned() for t in copies)
        files = {t.untyped_storage().filename for t in copies}
        assert files == {None} if where == "host" else len(files) == len(copies)
    assert not [*tmp_path.iterdir()]


def test_masks_may_be_infinite_and_shared_weights_are_copied_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.register_buffer("mask", torch.full((4,), -math.inf))
    rewind = Rewind(model, torch.optim.SGD(model.parameters(), lr=0.1), window=WINDOW, every=1)
    rewind.observe(1.0)
    assert not rewind.events
    assert [*rewind._trusted["model"]] == ["0.weight", "0.bias", "1.bias", "mask"]


def test_it_leaves_the_optimizer_as_it_was():
    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS + HIGH[:8])
    rewind.close()
    before = model.weight.clone()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert model.weight == before - 1


@pytest.mark.parametrize("by", ["position", "name"])
def test_gradients_that_a_closure_makes_move_nothing_if_they_are_not_finite(by):
    """As Lightning has every optimizer called."""
    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer, every=1, window=WINDOW)

    def closure():
        model.weight.grad = torch.full_like(model.weight, math.nan)
        return torch.tensor(1.0)

    if by == "position":
        assert optimizer.step(closure) == 1.0
    else:
        assert optimizer.step(closure=closure) == 1.0
    rewind.observe(1.0)
    assert model.weight.item() == 0 and rewind.skipped == 1 and not rewind.events


class Counting(torch.optim.SGD):
    """Its memory is in its groups and under names with dots, as some have it."""

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        group["count"] = group.get("count", 0) + 1
        for param in group["params"]:
            param -= group["lr"] * param.grad
            self.state[param]["of.all"] = torch.tensor(group["count"])


def test_all_that_an_optimizer_remembers_goes_back():
    model, optimizer = one_weight(Counting)
    model.register_buffer("one_for_many", torch.zeros(1).expand(5), persistent=False)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS)
    optimizer.param_groups[0]["weight_decay"] = 0.1  # a setting
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), rewind.state_dict()))
    for resumes in (False, True):
        if resumes:
            model, optimizer = one_weight(Counting)
            model.register_buffer("one_for_many", torch.zeros(1).expand(5), persistent=False)
            rewind = Rewind(model, optimizer, window=WINDOW, every=4)
            for one, its_state in zip((model, optimizer, rewind), state, strict=True):
                one.load_state_dict(its_state)
        drive(rewind, model, optimizer, HIGH[:8])
        (event,) = rewind.events
        group = optimizer.param_groups[0]
        assert group["count"] == 136 - event.thrown and group["weight_decay"] == 0.1
        assert optimizer.state[model.weight] == {"of.all": group["count"]}


def test_of_two_on_one_optimizer_the_last_one_watches():
    model, optimizer = one_weight()
    first = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(first, model, optimizer, FALLS + HIGH[:8])
    assert first.scale == 0.5
    Rewind(model, optimizer, window=WINDOW, every=4)
    before = model.weight.item()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert model.weight.item() == before - 1


class Assigning(nn.Module):
    """Its forward pass puts another buffer in the place of one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.layer(x - self.mean)


def test_a_buffer_that_is_assigned_goes_back():
    torch.manual_seed(0)
    model = Assigning()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    for step in range(200):
        x = torch.full((8, 1), math.nan if step == 150 else 1.0)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewind.observe(loss)
    assert len(rewind.events) == 1 and model.mean.isfinite() and loss.isfinite()


def test_weights_that_are_loaded_before_the_first_step_are_what_it_goes_back_to():
    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer, window=WINDOW, every=1)
    model.load_state_dict({"weight": torch.full((1, 1), 7.0)})
    drive(rewind, model, optimizer, [1.0])
    model.weight.data.fill_(math.nan)
    drive(rewind, model, optimizer, [1.0])
    assert rewind.returns == 1 and model.weight.item() == 7


def test_one_that_nobody_has_or_that_is_closed_does_nothing():
    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS + HIGH[:8])
    assert rewind.scale == 0.5
    rewind.close()
    with pytest.raises(ValueError, match=r"^Rewind must be open, got one that close"):
        rewind.observe(1.0)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS + HIGH[:8])
    assert rewind.scale == 0.5
    del rewind
    before = model.weight.item()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert model.weight.item() == before - 1 and not optimizer._optimizer_step_pre_hooks


def test_gradients_of_steps_between_two_calls_are_all_looked_at():
    model, optimizer = one_weight()
    rewind = Rewind(model, optimizer, window=WINDOW, every=1)
    for gradient in (math.nan, 1.0):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
    rewind.observe(1.0)
    assert rewind.skipped == 1


def test_a_sparse_gradient_that_is_not_finite_moves_nothing():
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    rewind = Rewind(model, optimizer, window=WINDOW, every=1)
    before = model.weight.detach().clone()
    (model(torch.tensor([1, 1])) * math.nan).sum().backward()
    optimizer.step()
    rewind.observe(1.0)
    assert torch.equal(model.weight, before) and rewind.skipped == 1
