"""What ``Rewind`` sets back."""

import copy
import math

import pytest
import torch
from models import WRITTEN, Differences, Writing, loss_fn, minibatches, mlp, step_by
from rewinding import FALLS, HIGH, WINDOW, drive, network, one_weight, train, watched
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lossguard.torch import Rewind, RewindEvent


def test_masks_may_be_infinite_and_shared_weights_are_copied_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.register_buffer("mask", torch.full((4,), -math.inf))
    model.frozen = nn.Parameter(model.mask.clone(), requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewind = Rewind(model, optimizer, window=WINDOW, every=1)
    rewind.observe(1.0)
    assert not rewind.events
    assert [*rewind._trusted["model"]] == ["frozen", "0.weight", "0.bias", "1.bias", "mask"]


class Counting(torch.optim.SGD):
    """Its memory is in its groups, of no parameter, and under names with dots, as some have it."""

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        group["count"] = group.get("count", 0) + 1
        for param in group["params"]:
            param -= group["lr"] * param.grad
            self.state[param]["of.all"] = torch.tensor(group["count"])
        memory = self.state["all"]
        memory["steps"] = memory.get("steps", 0) + 1
        memory["mean"] = torch.tensor(memory["steps"] / 2)


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
        assert optimizer.state["all"] == {"steps": 112, "mean": 56}


def test_a_memory_that_came_after_the_start_goes():
    rewind, model, optimizer = watched(Counting)
    drive(rewind, model, optimizer, [math.nan] * 8)
    assert rewind.returns == 1 and not optimizer.state


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
        loss = step_by(optimizer, model(x).square().mean())
        rewind.observe(loss)
    assert len(rewind.events) == 1 and model.mean.isfinite() and loss.isfinite()


def test_weights_that_are_loaded_before_the_first_step_are_what_it_goes_back_to():
    rewind, model, optimizer = watched(every=1)
    model.load_state_dict({"weight": torch.full((1, 1), 7.0)})
    drive(rewind, model, optimizer, [1.0])
    model.weight.data.fill_(math.nan)
    drive(rewind, model, optimizer, [1.0])
    assert rewind.returns == 1 and model.weight.item() == 7


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


@pytest.mark.parametrize("counter", WRITTEN)
def test_what_a_step_writes_to_in_a_group_goes_back(counter):
    rewind, model, optimizer = watched(Writing, counter=counter)
    drive(rewind, model, optimizer, FALLS + HIGH[:8])
    assert rewind.returns == 1 and optimizer.param_groups[0]["k"][0] == 112
    drive(rewind, model, optimizer, FALLS[:3])
    assert optimizer.param_groups[0]["k"][0] == 115


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_what_is_sparse_goes_back(tmp_path, layout, offload):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 2, sparse=True)
            self.register_buffer("edges", getattr(torch.eye(6), layout)())

    model = Graph()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"window": WINDOW, "every": 4, "offload": tmp_path if offload else False}
    rewind = Rewind(model, optimizer, **options)
    for call, loss in enumerate(FALLS + HIGH[:8]):
        if call == 112:
            before = model.embedding.weight.detach().clone()
            memory = optimizer.state[model.embedding.weight]["momentum_buffer"].to_dense()
            model.edges.values().fill_(7.0)
        step_by(optimizer, model.embedding(torch.arange(call % 6)).sum())
        rewind.observe(loss)
    assert rewind.returns == 1 and torch.equal(model.embedding.weight, before)
    now = optimizer.state[model.embedding.weight]["momentum_buffer"].to_dense()
    assert torch.equal(now, memory) and torch.equal(model.edges.to_dense(), torch.eye(6))
    model.edges.values().fill_(math.nan)  # which is set back by itself
    for _ in range(4):
        step_by(optimizer, model.embedding(torch.arange(3)).sum())
        rewind.observe(1.0)
    assert rewind.returns == 1 and torch.equal(model.edges.to_dense(), torch.eye(6))


@pytest.mark.parametrize("offload", [False, True])
def test_an_average_of_weights_that_is_named_goes_back(offload, tmp_path):
    model, optimizer = one_weight()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    options = {"window": WINDOW, "every": 4, "offload": tmp_path if offload else False}
    rewind = Rewind(model, optimizer, schedulers=[average], **options)
    (saved,) = rewind._trusted["also"]
    assert saved._metadata.keys() == average.state_dict()._metadata.keys()
    assert all((t.untyped_storage().filename is not None) == offload for t in saved.values())

    def update():
        average.update_parameters(model)

    drive(rewind, model, optimizer, FALLS[:112], after=update)
    before = copy.deepcopy(average.state_dict())
    drive(rewind, model, optimizer, FALLS[112:] + HIGH[:8], after=update)
    assert rewind.returns == 1 and model.weight.item() == -112
    torch.testing.assert_close(average.state_dict(), before, rtol=0, atol=0)


def test_inputs_that_are_not_finite_cost_no_more_than_their_steps(caplog):
    """BatchNorm's statistics are lost in the forward pass, before any gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    for call, (x, t) in enumerate(minibatches(128)):
        x = x.clone()
        x[0, 0] = math.nan if call in (50, 51, 90) else x[0, 0]
        rewind.observe(step_by(optimizer, loss_fn(model, (x, t))))
        if call % 4 == 3:
            assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    calls = ((52, 2), (92, 3))
    told = [RewindEvent("buffers", "model", call, 0, 0, 1.0, n) for call, n in calls]
    assert rewind.events == told and rewind.skipped == 3 and rewind.scale == 1
    assert [record.message for record in caplog.records] == [
        "Rewind set back the buffers, which were not finite "
        f"(cause: model, call {call}, {count} steps not finite so far)"
        for call, count in calls
    ]


def test_a_buffer_that_is_the_input_belongs_to_the_user():
    torch.manual_seed(0)
    data, model = torch.randn(136, 4, 2), Differences()
    before, optimizer = data.clone(), torch.optim.SGD(model.parameters(), lr=0.01)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    for x, loss in zip(data, FALLS + HIGH[:8], strict=True):
        step_by(optimizer, model(x).square().mean())
        rewind.observe(loss)
    assert rewind.returns == 1 and torch.equal(data, before)
    assert torch.equal(model.last, data[111])


def test_a_memory_that_a_finite_gradient_makes_infinite_goes_back():
    """AdamW would stand still for ever, at a loss that is no higher than it was."""
    model, optimizer = one_weight(torch.optim.AdamW, lr=0.01)
    rewind = Rewind(model.float(), optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, [1.0] * 70)
    drive(rewind, model, optimizer, [1.0], gradient=1e25)
    assert optimizer.state[model.weight]["exp_avg_sq"].isinf()
    drive(rewind, model, optimizer, [1.0] * 9)
    (event,) = rewind.events
    assert (event.kind, event.cause, event.call, event.thrown) == ("return", "model", 80, 16)
    assert optimizer.state[model.weight]["exp_avg_sq"].isfinite()
    assert rewind.thrown == 16


def test_an_infinite_memory_is_seen_after_a_resume_and_in_the_first_block():
    for burst, before in ((70, 72), (6, 10)):
        model, optimizer = one_weight(torch.optim.AdamW, lr=0.01)
        rewind = Rewind(model.float(), optimizer, window=WINDOW, every=4)
        drive(rewind, model, optimizer, [1.0] * burst)
        drive(rewind, model, optimizer, [1.0], gradient=1e25)
        drive(rewind, model, optimizer, [1.0] * (before - burst - 1))
        model, twin = copy.deepcopy(model), rewind
        optimizer_state, state = copy.deepcopy(optimizer.state_dict()), rewind.state_dict()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer.load_state_dict(optimizer_state)
        rewind = Rewind(model, optimizer, window=WINDOW, every=4)
        rewind.load_state_dict(copy.deepcopy(state))
        drive(rewind, model, optimizer, [1.0] * 32)
        assert rewind.returns == 1 and twin.returns == 0
        assert optimizer.state[model.weight]["exp_avg_sq"].isfinite()


def test_a_memory_that_no_return_makes_finite_is_the_optimizers_affair():
    """After three returns to where it was not there yet."""

    class Bounds(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                self.state[p]["least"] = torch.tensor(math.inf)

    model, optimizer = one_weight(Bounds)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, [1.0] * 400)
    assert [event.cause for event in rewind.events] == ["model"] * 3
    assert rewind._trusted["optimizer"] and rewind.thrown == 48


def goes_wrong(model, optimizer, rewind, inputs, steps, fault=0.0):
    for _ in range(steps):
        rewind.observe(step_by(optimizer, model(inputs).square().mean()) + fault)


def test_parameters_that_are_unfrozen_go_back_to_a_time_when_they_were_frozen():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2].parameters())
    rewind, (x, _) = Rewind(model, optimizer, window=WINDOW), minibatches(1)[0]
    goes_wrong(model, optimizer, rewind, x, 100)
    before = model[0].weight.clone()
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": [*model[0].parameters()], "lr": 0.1})
    goes_wrong(model, optimizer, rewind, x, 12)
    assert not torch.equal(model[0].weight, before)
    saved = rewind.state_dict()
    goes_wrong(model, optimizer, rewind, x, 16, fault=9.0)
    assert torch.equal(model[0].weight, before) and not optimizer.state[model[0].weight]
    assert optimizer.state[model[2].weight]["step"] == 96
    assert optimizer.param_groups[1]["lr"] == 0.1
    rewind.load_state_dict(saved)
    goes_wrong(model, optimizer, rewind, x, 200)


class Lazy(nn.Module):
    """Its first forward pass makes a mask, and longer inputs a longer table."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.full((4,), -math.inf)
        if len(self.table) < len(x):
            self.table = torch.ones(len(x))
        return self.layer(self.norm(x)) * self.table[: len(x), None] + self.mask.exp().sum()


def test_buffers_that_a_forward_pass_makes_or_makes_longer():
    model = Lazy()
    optimizer = torch.optim.Adam(model.parameters())
    rewind = Rewind(model, optimizer, window=WINDOW)
    goes_wrong(model, optimizer, rewind, torch.randn(5, 4), 128)
    assert not rewind.events and model.norm.num_batches_tracked == 128
    fresh = Lazy()
    again = Rewind(fresh, torch.optim.Adam(fresh.parameters()), window=WINDOW)
    again.load_state_dict(rewind.state_dict())
    for one in (rewind, again):
        one._live.load(one._trusted)
        assert one._live.model.norm.num_batches_tracked == 112
    goes_wrong(model, optimizer, rewind, torch.randn(7, 4), 40, fault=9.0)
    assert rewind.returns > 0 and model.table.shape == (7,)


def test_a_parameter_that_was_renamed_goes_back_and_another_one_is_refused():
    model, (x, _) = mlp(), minibatches(1)[0]
    optimizer = torch.optim.Adam(model.parameters())
    rewind = Rewind(model, optimizer, window=WINDOW)
    goes_wrong(model, optimizer, rewind, x, 96)
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    goes_wrong(model, optimizer, rewind, x, 48)
    goes_wrong(model, optimizer, rewind, x, 40, fault=9.0)
    assert rewind.returns > 0
    model.adapter = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"^model must have the parameters that it had .*adapter"):
        goes_wrong(model[:3], optimizer, rewind, x, 200)


def test_a_parameter_that_got_another_shape_is_refused():
    """As resize_token_embeddings of transformers makes it; one row would be put in all places."""
    table = nn.Embedding(1, 3)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.01)
    rewind = Rewind(table, optimizer, window=WINDOW)
    table.weight.data = torch.randn(6, 3)
    with pytest.raises(ValueError, match=r"^model must have .* or of another shape, weight"):
        goes_wrong(table, optimizer, rewind, torch.arange(2), 96)


def test_a_buffer_made_under_inference_mode_goes_back():
    """As Lightning validates: a table may grow in a longer forward pass there."""
    model, optimizer = one_weight()
    with torch.inference_mode():
        model.register_buffer("table", torch.ones(4))
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    drive(rewind, model, optimizer, FALLS)
    with torch.inference_mode():
        model.table.fill_(5)
    model.register_buffer("trained", torch.ones(2, requires_grad=True))
    drive(rewind, model, optimizer, HIGH)
    assert rewind.returns and model.table.tolist() == [1.0] * 4


def test_a_rate_made_under_inference_mode_is_lowered_and_raised():
    model, optimizer = one_weight()
    with torch.inference_mode():
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    for losses in (FALLS, HIGH):
        drive(rewind, model, optimizer, losses)
    assert rewind.returns and float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_it_may_be_built_and_read_in_inference_mode():
    model, optimizer = one_weight(momentum=0.9)

    def read():
        with torch.inference_mode():
            rewind.read()

    with torch.inference_mode():
        rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    for losses in (FALLS, HIGH, FALLS):
        drive(rewind, model, optimizer, losses, after=read)
    assert rewind.returns
    for tensor in [*rewind._trusted["model"].values(), *optimizer.state[model.weight].values()]:
        assert not tensor.is_inference()


def test_inputs_that_are_not_finite_in_the_first_minibatch_ruin_no_buffers():
    """A forward pass has changed them before the first step, which saves where to go back to."""
    model, optimizer = network()
    rewind = Rewind(model, optimizer, window=WINDOW, every=4)
    x, t = torch.randn(32, 8), torch.zeros(32, dtype=torch.long)
    for inputs in (x * math.nan, *[x] * 7):
        nn.functional.cross_entropy(model(inputs), t).backward()
        optimizer.step()
        optimizer.zero_grad()
        rewind.observe(1.0)
    assert [event.kind for event in rewind.events] == ["buffers"]
    assert all(buffer.isfinite().all() for buffer in model.buffers())
