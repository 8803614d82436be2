"""What ``Rewind`` copies and sets back, and which copies it keeps."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from models import WRITTEN, Differences, Writing, loss_fn, minibatches, mlp, step_by
from rewinding import calm, drive, network, one_weight, train, watched
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lossguard.torch import Rewind
from lossguard.torch.rewind.store import EVERY, Live, Store, copied
from lossguard.torch.tensors import leaves


def live_of(model, *optimizers, also=(), offload=False):
    return Live(model, optimizers, also, offload=offload)


def take(model, optimizer, steps, gradient=1.0):
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient) if p.requires_grad else None
        optimizer.step()


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
    live = live_of(model, optimizer)
    take(model, optimizer, 3)
    content = live.copy()
    take(model, optimizer, 4)
    optimizer.param_groups[0]["weight_decay"] = 0.1  # a setting, which stays
    live.set_back(content)
    assert model.weight.item() == -3 and optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[0]["count"] == 3
    assert optimizer.state[model.weight] == {"of.all": 3}
    assert optimizer.state["all"] == {"steps": 3, "mean": 1.5}


@pytest.mark.parametrize("counter", WRITTEN)
def test_what_a_step_writes_to_in_a_group_goes_back(counter):
    model, optimizer = one_weight(Writing, counter=counter)
    live = live_of(model, optimizer)
    take(model, optimizer, 3)
    content = live.copy()
    take(model, optimizer, 4)
    live.set_back(content)
    assert optimizer.param_groups[0]["k"][0] == 3
    take(model, optimizer, 2)
    assert optimizer.param_groups[0]["k"][0] == 5


def test_a_memory_that_came_after_the_copy_goes():
    model, optimizer = one_weight(torch.optim.Adam)
    live = live_of(model, optimizer)
    content = live.copy()
    take(model, optimizer, 2)
    live.set_back(content)
    assert not optimizer.state[model.weight] and not model.weight.grad.any()


def test_a_memory_is_made_new_where_it_began_with_nothing():
    for begun in (False, True):
        model, optimizer = one_weight(torch.optim.Adam)
        take(model, optimizer, begun)
        live = live_of(model, optimizer)
        take(model, optimizer, 2)
        content = live.copy()
        assert live.set_back(content, forget=True) is not begun
        assert bool(optimizer.state[model.weight]) == begun


def test_what_is_not_trained_is_not_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.register_buffer("mask", torch.full((4,), -math.inf))
    model[2].requires_grad_(False)  # and in the optimizer all the same
    model.frozen = nn.Parameter(model.mask.clone(), requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    live = live_of(model, optimizer)
    assert [*live.copy()["model"]] == ["0.weight", "0.bias", "1.bias", "mask"]
    assert all(map(bool, live.are_finite()))
    live.check_still()
    with torch.no_grad():
        model.frozen.fill_(1.0)
    with pytest.raises(ValueError, match=r"^parameters that no optimizer trains .* another frozen"):
        live.check_still()


def test_a_frozen_base_that_has_no_numbers_is_left_alone():
    """As of quantized tensor classes."""

    class Quantized(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.isfinite, torch.abs, torch.linalg.vector_norm, torch.clone):
                raise NotImplementedError(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    model, optimizer = one_weight()
    base = torch.ones(2, 2, dtype=torch.float64).as_subclass(Quantized)
    model.base = nn.Parameter(base, requires_grad=False)
    rewind = Rewind(model, optimizer, every=4)
    drive(rewind, model, optimizer, calm(80))
    assert not rewind.events


def test_what_is_unfrozen_is_copied_at_once():
    model, optimizer = mlp(), None
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    rewind, (x, _) = Rewind(model, optimizer, every=4), minibatches(1)[0]
    for call in range(16):
        if call == 10:
            model[0].requires_grad_(True)
        rewind.observe(step_by(optimizer, model(x).square().mean()))
    copies = ["0.weight" in one.content["model"] for one in rewind._run.store]
    assert copies == [False, True] and rewind._run.store.youngest.step == 12
    assert rewind._run.store.before(11) is None


class Assigning(nn.Module):
    """Its forward pass puts another buffer in the place of one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.layer(x - self.mean)


def test_a_buffer_that_is_assigned_goes_back():
    model = Assigning()
    live = live_of(model, torch.optim.SGD(model.parameters(), lr=0.01))
    model(torch.ones(2, 1))
    content, before = live.copy(), model.mean.clone()
    model(torch.ones(2, 1))
    live.set_back(content)
    assert torch.equal(model.mean, before)


def test_a_buffer_that_is_the_input_belongs_to_the_user():
    data, model = torch.randn(2, 4, 2), Differences()
    before = data.clone()
    live = live_of(model, torch.optim.SGD(model.parameters(), lr=0.01))
    model(data[0])
    content = live.copy()
    model(data[1])
    live.set_back(content)
    assert torch.equal(data, before) and torch.equal(model.last, data[0])


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


def test_buffers_that_a_forward_pass_makes_or_makes_longer_stay():
    model = Lazy()
    live = live_of(model, torch.optim.Adam(model.parameters()))
    content = live.copy()
    model(torch.randn(5, 4))
    live.copy()
    assert all(map(bool, live.are_finite()))  # the mask isn't, and never was
    live.set_back(content)
    assert model.norm.num_batches_tracked == 0 and model.table.shape == (5,)


def test_a_buffer_and_a_rate_made_under_inference_mode_go_back():
    """As Lightning validates: a table may grow in a longer forward pass there."""
    model, optimizer = one_weight()
    with torch.inference_mode():
        model.register_buffer("table", torch.ones(4))
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    live = live_of(model, optimizer)
    with torch.inference_mode():
        content = live.copy()
        model.table.fill_(5)
        live.set_back(content)
    assert model.table.tolist() == [1.0] * 4
    assert not any(tensor.is_inference() for tensor in content["model"].values())


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_what_is_sparse_goes_back(layout, offload):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 2, sparse=True)
            self.register_buffer("edges", getattr(torch.eye(6), layout)())

    model = Graph()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    live = live_of(model, optimizer, offload=offload)
    step_by(optimizer, model.embedding(torch.arange(3)).sum())
    content = live.copy()
    before = model.embedding.weight.detach().clone()
    memory = optimizer.state[model.embedding.weight]["momentum_buffer"].to_dense().clone()
    step_by(optimizer, model.embedding(torch.arange(4)).sum())
    model.edges.values().fill_(math.nan)
    assert [bool(one) for one in live.are_finite()] == [True, False]
    live.set_back(content)
    now = optimizer.state[model.embedding.weight]["momentum_buffer"].to_dense()
    assert torch.equal(model.embedding.weight, before) and torch.equal(now, memory)
    assert torch.equal(model.edges.to_dense(), torch.eye(6))


def test_tensors_in_lists_go_back():
    model, optimizer = one_weight()
    held = optimizer.state[model.weight]["factors"] = [torch.ones(3), (torch.zeros(2),)]
    live = live_of(model, optimizer)
    content = live.copy()
    held[0].add_(1)
    held[1][0].fill_(5)
    live.set_back(content)
    first, (second,) = optimizer.state[model.weight]["factors"]
    assert first.tolist() == [1, 1, 1] and second.tolist() == [0, 0]


def test_an_average_of_weights_that_is_named_goes_back():
    model, optimizer = one_weight()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    live = live_of(model, optimizer, also=[average])
    take(model, optimizer, 3)
    average.update_parameters(model)
    content, before = live.copy(), copy.deepcopy(average.state_dict())
    take(model, optimizer, 3)
    average.update_parameters(model)
    live.set_back(content)
    torch.testing.assert_close(average.state_dict(), before, rtol=0, atol=0)


def test_momentum_and_rates_that_a_named_scheduler_sets_go_back_with_it():
    model, optimizer = one_weight(torch.optim.Adam, betas=(0.9, 0.99))
    one = lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=1000)
    live = live_of(model, optimizer, also=[one])
    for _ in range(3):
        take(model, optimizer, 1)
        one.step()
    content, group = live.copy(), optimizer.param_groups[0]
    rate, betas = group["lr"], group["betas"]
    for _ in range(3):
        take(model, optimizer, 1)
        one.step()
    assert group["betas"] != betas
    live.set_back(content)
    assert one.last_epoch == 3 and (group["lr"], group["betas"]) == (rate, betas)


def test_rates_stay_where_no_scheduler_is_named():
    model, optimizer = one_weight()
    live = live_of(model, optimizer)
    content = live.copy()
    optimizer.param_groups[0]["lr"] = 0.2
    live.set_back(content)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_named_scheduler_that_tells_no_optimizer_is_of_all_of_them():
    model = nn.Linear(2, 1)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    scheduler = SimpleNamespace(state_dict=dict, load_state_dict=id, get_last_lr=lambda: [0.1])
    live = live_of(model, *optimizers, also=[scheduler])
    content = live.copy()
    for one in optimizers:
        one.param_groups[0]["lr"] = 0.2
    live.set_back(content)
    assert [one.param_groups[0]["lr"] for one in optimizers] == [0.1, 0.1]


def size_of(content):
    tensors = [value for value in leaves(content) if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_there_are_two_copies_in_the_same_memory():
    model, optimizer = network()
    rewind = Rewind(model, optimizer)
    train(model, optimizer, rewind, 0, 140)
    whole = size_of([model.state_dict(), [*optimizer.state.values()]])
    assert [size_of(one.content) for one in rewind._run.store] == [whole, whole]

    def places():
        tensors = (t for one in rewind._run.store for t in one.content["model"].values())
        return {t.data_ptr() for t in tensors}

    kept = places()
    train(model, optimizer, rewind, 140, 300)
    assert places() == kept


def saves(count, *, offload, good=lambda step: step):
    model, optimizer = one_weight()
    store = Store(live_of(model, optimizer), offload=offload)
    for step in range(0, EVERY * count, EVERY):
        store.save(step, step, good(step))
    return [one.step // EVERY for one in store]


def test_the_last_two_are_kept_and_one_that_is_good():
    assert saves(10, offload=False) == [8, 9]
    assert saves(10, offload=False, good=lambda step: min(step, 5 * EVERY)) == [5, 9]


def test_in_the_hosts_memory_ages_grow():
    assert saves(1000, offload=True) == [767, 959, 991, 998, 999]
    kept = saves(1000, offload=True, good=lambda step: min(step, 500 * EVERY))
    assert 499 <= max(one for one in kept if one <= 500) <= 500


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_copies_in_the_hosts_memory_change_nothing(device):
    runs = []
    for offload in (False, True):
        model, optimizer = network()
        model.to(device)
        rewind = Rewind(model, optimizer, offload=offload)
        train(model, optimizer, rewind, 0, 300, range(200, 232))
        runs.append((model, rewind))
    (one, plain), (other, rewind) = runs
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert rewind.events == plain.events and plain.returns == 1
    tensors = [t for t in leaves(rewind._run.store.youngest.content) if isinstance(t, torch.Tensor)]
    assert all(t.device.type == "cpu" for t in tensors)
    assert device == "cpu" or any(t.is_pinned() for t in tensors)


def test_what_is_sparse_is_not_pinned(monkeypatch):
    sparse = torch.eye(3).to_sparse()
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))  # as it is on a GPU
    made = copied(sparse, None, torch.device("cpu"))
    monkeypatch.undo()
    assert torch.equal(made.to_dense(), torch.eye(3)) and made is not sparse


def test_inputs_that_are_not_finite_cost_no_more_than_their_steps():
    """BatchNorm's statistics are lost in the forward pass, before any gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rewind = Rewind(model, optimizer, every=4)
    for call, (x, t) in enumerate(minibatches(128)):
        x = x.clone()
        x[0, 0] = math.nan if call in (0, 50, 51, 90) else x[0, 0]
        rewind.observe(step_by(optimizer, loss_fn(model, (x, t))))
        if call % 4 == 3:
            assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    told = [(event.kind, event.call) for event in rewind.events if event.kind == "buffers"]
    assert told == [("buffers", 4), ("buffers", 52), ("buffers", 92)]
    assert rewind.skipped == 4 and rewind.scale == 1 and rewind.discarded == 0


def test_weights_that_are_loaded_before_the_first_step_are_what_it_goes_back_to():
    rewind, model, optimizer = watched(every=1)
    model.load_state_dict({"weight": torch.full((1, 1), 7.0)})
    drive(rewind, model, optimizer, [1.0])
    model.weight.data.fill_(math.nan)
    drive(rewind, model, optimizer, [1.0])
    assert rewind.returns == 1 and model.weight.item() == 7


def test_a_memory_that_a_finite_gradient_makes_infinite_goes_back():
    """AdamW would stand still for ever, at a loss that is no higher than it was."""
    model, optimizer = one_weight(torch.optim.AdamW, lr=0.01)
    rewind = Rewind(model.float(), optimizer, every=4)
    drive(rewind, model, optimizer, calm(70))
    optimizer.state[model.weight]["exp_avg_sq"].fill_(math.inf)
    drive(rewind, model, optimizer, calm(58))
    (event,) = rewind.events
    assert (event.kind, event.cause, event.call, event.since) == ("return", "model", 128, 64)
    assert optimizer.state[model.weight]["exp_avg_sq"].isfinite()


def test_a_memory_that_no_return_makes_finite_is_the_optimizers_affair():
    class Bounds(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                self.state[p]["least"] = torch.tensor(math.inf)

    model, optimizer = one_weight(Bounds)
    rewind = Rewind(model, optimizer, every=4)
    drive(rewind, model, optimizer, calm(400))
    assert [event.cause for event in rewind.events] == ["model"] and rewind.discarded == 64
