"""What ``Rewind`` refuses, in one sentence each."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from models import refuses
from rewinding import WINDOW
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.optim import lr_scheduler

from lossguard.torch import Recommended, Rewind

HADNT = "optimizer must train parameters that the model has when Rewind is built, got one of shape"
OF_TWO = "(nn.ModuleList([model, loss]) has those of two)"
AROUND = (
    "optimizer must keep all that it remembers in its state, got SGD around SGD (give the inner "
    "one)"
)
EMPTY = (
    "parameters must hold numbers, got some on the meta device (call to_empty() and initialize "
    "them first) or of a lazy module (call it once first)"
)
WRONG = []


def told(sentence):
    """What the call below is refused with."""
    return lambda call: WRONG.append((call, sentence)) or call


def model_and_sgd():
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@told("model must be a Module such as nn.Linear(2, 1), got 'model'")
def no_model():
    Rewind("model", None)  # type: ignore


@told("optimizer must be a Optimizer such as torch.optim.AdamW(model.parameters()), got None")
def no_optimizer():
    Rewind(nn.Linear(2, 1), None)  # type: ignore


@told(f"{HADNT} (3,) that it hadn't {OF_TWO}")
def foreign():
    model, _ = model_and_sgd()
    Rewind(model, torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))


@told("optimizer must have a rate, lr, in each of its groups, got one without")
def without_a_rate():
    model, optimizer = model_and_sgd()
    optimizer.param_groups[0]["lr"] = None  # as Adafactor of transformers has it
    Rewind(model, optimizer)


@told(AROUND)
def around():
    model, optimizer = model_and_sgd()
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer.optimizer = optimizer  # as Lookahead has one, with weights of its own beside
    Rewind(model, outer)


@told(AROUND)
def around_several():
    model, optimizer = model_and_sgd()
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer.parts = {"one": [optimizer]}  # as containers of optimizers have them
    Rewind(model, outer)


@told(EMPTY)
def on_meta():
    model = nn.Linear(2, 1, device="meta")
    Rewind(model, torch.optim.SGD(model.parameters(), lr=0.1))


@told(EMPTY)
def lazy():
    model = nn.LazyLinear(1)
    Recommended(*(torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)), model=model)


@told(f"{HADNT} (1, 1) that it hadn't {OF_TWO}")
def later():
    model, optimizer = model_and_sgd()
    rewind = Rewind(model, optimizer, window=WINDOW, every=16)
    model.more = nn.Linear(1, 1, bias=False)
    optimizer.add_param_group({"params": model.more.parameters()})
    for _ in range(WINDOW):
        optimizer.step()
        rewind.observe(1.0)


@told("optimizer must be no guard, got a Recommended")
def around_a_guard():
    model, optimizer = model_and_sgd()
    other = torch.optim.Adam(model.parameters())
    Rewind(model, Recommended(other, optimizer, model=model))


@told("optimizer must be no guard's, got one of a Recommended")
def around_one_of_a_guard():
    model, optimizer = model_and_sgd()
    guard = Recommended(torch.optim.Adam(model.parameters()), optimizer, model=model)
    Rewind(model, optimizer)
    assert guard


@told("fallback must be watched by no Rewind, got one that is (close it)")
def under_a_guard():
    model, optimizer = model_and_sgd()
    rewind = Rewind(model, optimizer)
    Recommended(torch.optim.Adam(model.parameters()), optimizer, model=model)
    assert rewind


@told(
    "schedulers must each have state_dict and load_state_dict, and be of this optimizer if of any, "
    "got a StepLR"
)
def of_another():
    model, optimizer = model_and_sgd()
    _, other = model_and_sgd()
    Rewind(model, optimizer, schedulers=[lr_scheduler.StepLR(other, 5)])


@told("optimizers must train different parameters, got two that train weight")
def trained_twice():
    model, optimizer = model_and_sgd()
    Rewind(model, [optimizer, torch.optim.Adam(model.parameters())])


@told(
    "schedulers must each have state_dict and load_state_dict, and be of this optimizer if of any, "
    "got a SimpleNamespace"
)
def of_which_nothing_is_loaded():
    model, optimizer = model_and_sgd()
    Rewind(model, optimizer, schedulers=[SimpleNamespace(state_dict=dict)])


@told("optimizers must each be given once, got one twice")
def given_twice():
    model, optimizer = model_and_sgd()
    Rewind(model, [optimizer, optimizer])


@told("schedulers must have an optimizer where there are several, got a SimpleNamespace without")
def of_nobody():
    model = nn.Linear(2, 1)
    scheduler = SimpleNamespace(state_dict=dict, load_state_dict=id, get_last_lr=lambda: [0.1])
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    Rewind(model, optimizers, schedulers=[scheduler])


@told("offload must be True or False for shards, got 'folder'")
def shards():
    model, optimizer = model_and_sgd()
    model.weight.to_local = None  # as DTensors have it
    Rewind(model, optimizer, offload="folder")


@told(
    "model must be sharded by fully_shard, if it is, got FullyShardedDataParallel, whose "
    "parameters are parts of flat ones"
)
def flattened():
    """The mark is FullyShardedDataParallel's own, of every version since 2.8."""
    backend = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group("gloo", **backend)
    try:
        options = {"sharding_strategy": ShardingStrategy.NO_SHARD, "device_id": torch.device("cpu")}
        model = FullyShardedDataParallel(nn.Linear(2, 1), **options)
        Rewind(model, torch.optim.SGD(model.parameters(), lr=0.1))
    finally:
        distributed.destroy_process_group()


@told("model must be finite, got one that isn't")
def broken():
    model, optimizer = model_and_sgd()
    nn.init.constant_(model.weight, math.nan)
    Rewind(model, optimizer)


@pytest.mark.parametrize(("call", "sentence"), WRONG)
def test_what_it_refuses(call, sentence):
    with refuses(sentence, "$"):
        call()


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("offload", None, "be True, False or a folder, got None"),
        ("offload", "nowhere", "be a folder that is there, got 'nowhere'"),
        ("schedulers", 3, "be a Sequence such as [scheduler], got 3"),
        ("audit", 3, "be None or a function, got 3"),
        ("window", 100, "be a multiple of 8, got 100"),
        ("every", 10, "divide window / 4 = 64, got 10"),
        ("rho", 1.0, "be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_that_it_refuses(option, value, rule):
    with refuses(f"{option} must {rule}", "$"):
        Rewind(*model_and_sgd(), **{option: value})


@pytest.mark.parametrize("loss", [torch.ones(3), torch.tensor(1 + 1j)])
def test_losses_that_it_refuses(loss):
    with refuses(f"loss must be one number, got {loss!r}", "$"):
        Rewind(*model_and_sgd()).observe(loss)


OURS = "state must be of a Rewind with {'window': 256, 'every': 16}, got"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.clear(), f"{OURS} None"),
        (lambda s: s["options"].update(window=64), f"{OURS} {{'window': 64, 'every': 16}}"),
        (lambda s: s["trusted"]["also"].append({}), "state must have 0 schedulers, got 1"),
        (
            lambda s: s["trusted"]["model"].update(weight=torch.ones(9)),
            "state must be of this model, with weight of shape (1, 2), got shape (9,)",
        ),
    ],
)
def test_states_that_it_refuses(change, sentence):
    rewind = Rewind(*model_and_sgd())
    state = copy.deepcopy(rewind.state_dict())
    change(state)
    with refuses(sentence, "$"):
        rewind.load_state_dict(state)


def test_a_step_in_the_capture_of_a_graph_is_refused(monkeypatch):
    model, optimizer = model_and_sgd()
    rewind = Rewind(model, optimizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with refuses(
        "optimizer.step must be called outside of a CUDA graph for Rewind, got a step in its "
        "capture: no hooks run where it is replayed (capture only forward and backward)", "$",
    ):  # fmt: skip
        optimizer.step()
    rewind.close()
    optimizer.step()


@pytest.mark.parametrize("copies", [copy.deepcopy, copy.copy])
def test_it_is_not_copied(copies):
    rewind = Rewind(*model_and_sgd())
    with refuses("a Rewind can't be copied or pickled: "):
        copies(rewind)
