"""What ``Rewind`` refuses, in one sentence each."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.optim import lr_scheduler

from lossguard.torch import Recommended, Rewind

WINDOW = 64


def model_and_sgd():
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def foreign():
    model, _ = model_and_sgd()
    return Rewind(model, torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))


def without_a_rate():
    model, optimizer = model_and_sgd()
    optimizer.param_groups[0]["lr"] = None  # as Adafactor of transformers has it
    return Rewind(model, optimizer)


def around():
    model, optimizer = model_and_sgd()
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer.optimizer = optimizer  # as Lookahead has one, with weights of its own beside
    return Rewind(model, outer)


def around_several():
    model, optimizer = model_and_sgd()
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer.parts = {"one": [optimizer]}  # as containers of optimizers have them
    return Rewind(model, outer)


def on_meta():
    model = nn.Linear(2, 1, device="meta")
    return Rewind(model, torch.optim.SGD(model.parameters(), lr=0.1))


def lazy():
    model = nn.LazyLinear(1)
    return Recommended(
        *(torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)), model=model
    )


def later():
    model, optimizer = model_and_sgd()
    rewind = Rewind(model, optimizer, window=WINDOW, every=16)
    model.more = nn.Linear(1, 1, bias=False)
    optimizer.add_param_group({"params": model.more.parameters()})
    for _ in range(WINDOW):
        optimizer.step()
        rewind.observe(1.0)


def around_a_guard():
    model, optimizer = model_and_sgd()
    other = torch.optim.Adam(model.parameters())
    return Rewind(model, Recommended(other, optimizer, model=model))


def of_another():
    model, optimizer = model_and_sgd()
    _, other = model_and_sgd()
    return Rewind(model, optimizer, schedulers=[lr_scheduler.StepLR(other, 5)])


def trained_twice():
    model, optimizer = model_and_sgd()
    return Rewind(model, [optimizer, torch.optim.Adam(model.parameters())])


def of_nobody():
    model = nn.Linear(2, 1)
    scheduler = SimpleNamespace(state_dict=dict, get_last_lr=lambda: [0.1])
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    return Rewind(model, optimizers, schedulers=[scheduler])


def shards():
    model, optimizer = model_and_sgd()
    model.weight.to_local = None  # as DTensors have it
    return Rewind(model, optimizer, offload="folder")


def flattened():
    """The mark is FullyShardedDataParallel's own, of every version since 2.8."""
    backend = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    distributed.init_process_group("gloo", **backend)
    try:
        options = {"sharding_strategy": ShardingStrategy.NO_SHARD, "device_id": torch.device("cpu")}
        model = FullyShardedDataParallel(nn.Linear(2, 1), **options)
        return Rewind(model, torch.optim.SGD(model.parameters(), lr=0.1))
    finally:
        distributed.destroy_process_group()


def broken():
    model, optimizer = model_and_sgd()
    nn.init.constant_(model.weight, math.nan)
    return Rewind(model, optimizer)


def loaded(change):
    rewind = Rewind(*model_and_sgd())
    state = copy.deepcopy(rewind.state_dict())
    change(state)
    rewind.load_state_dict(state)


WRONG = {
    "model": (
        lambda: Rewind("model", None),  # type: ignore
        "model must be a Module such as nn.Linear(2, 1), got 'model'",
    ),
    "optimizer": (
        lambda: Rewind(nn.Linear(2, 1), None),  # type: ignore
        "optimizer must be a Optimizer such as torch.optim.AdamW(model.parameters()), got None",
    ),
    "foreign": (
        foreign,
        "optimizer must train parameters that the model has when Rewind is built, got one of "
        "shape (3,) that it hadn't",
    ),
    "around": (
        around,
        "optimizer must keep all that it remembers in its state, got SGD around SGD",
    ),
    "around several": (
        around_several,
        "optimizer must keep all that it remembers in its state, got SGD around SGD",
    ),
    "on meta": (
        on_meta,
        "parameters must hold numbers, got some on the meta device (call to_empty() and initialize "
        "them first) or of a lazy module (call it once first)",
    ),
    "lazy": (
        lazy,
        "parameters must hold numbers, got some on the meta device (call to_empty() and initialize "
        "them first) or of a lazy module (call it once first)",
    ),
    "no rate": (
        without_a_rate,
        "optimizer must have a rate, lr, in each of its groups, got one without",
    ),
    "shards": (shards, "offload must be True or False for shards, got 'folder'"),
    "flattened": (
        flattened,
        "model must be sharded by fully_shard, if it is, got FullyShardedDataParallel, whose "
        "parameters are parts of flat ones",
    ),
    "not finite": (broken, "model must be finite, got one that isn't"),
    "schedulers": (
        lambda: loaded(lambda state: state["trusted"]["also"].append({})),
        "state must have 0 schedulers, got 1",
    ),
    "offload": (
        lambda: Rewind(*model_and_sgd(), offload=None),  # type: ignore
        "offload must be True, False or a folder, got None",
    ),
    "later": (
        later,
        "optimizer must train parameters that the model has when Rewind is built, got one of "
        "shape (1, 1) that it hadn't",
    ),
    "guard": (
        around_a_guard,
        "optimizer must be no guard, got a Recommended",
    ),
    "another's scheduler": (
        of_another,
        "schedulers must each have a state_dict, and be of this optimizer if of any, got a StepLR",
    ),
    "trained twice": (
        trained_twice,
        "optimizers must train different parameters, got two that train weight",
    ),
    "given twice": (
        lambda: Rewind((ours := model_and_sgd())[0], [ours[1], ours[1]]),
        "optimizers must each be given once, got one twice",
    ),
    "state dict": (
        lambda: Rewind(nn.Linear(99, 99).state_dict(), None),  # type: ignore
        "model must be a Module such as nn.Linear(2, 1), got a OrderedDict",
    ),
    "scheduler of nobody": (
        of_nobody,
        "schedulers must have an optimizer where there are several, got a SimpleNamespace without",
    ),
    "one scheduler": (
        lambda: Rewind(*model_and_sgd(), schedulers=3),  # type: ignore
        "schedulers must be a Sequence such as [scheduler], got 3",
    ),
    "audit": (
        lambda: Rewind(*model_and_sgd(), audit=3),  # type: ignore
        "audit must be None or a function, got 3",
    ),
    "folder": (
        lambda: Rewind(*model_and_sgd(), offload="nowhere"),
        "offload must be a folder that is there, got 'nowhere'",
    ),
    "window": (
        lambda: Rewind(*model_and_sgd(), window=100),
        "window must be a multiple of 8, got 100",
    ),
    "every": (
        lambda: Rewind(*model_and_sgd(), every=10),
        "every must divide window / 4 = 64, got 10",
    ),
    "rho": (
        lambda: Rewind(*model_and_sgd(), rho=1.0),
        "rho must be at least 0 and below 1, got 1.0",
    ),
    "loss": (
        lambda: Rewind(*model_and_sgd()).observe(torch.ones(3)),
        "loss must be one number, got tensor([1., 1., 1.])",
    ),
    "complex loss": (
        lambda: Rewind(*model_and_sgd()).observe(torch.tensor(1 + 1j)),
        "loss must be one number, got tensor(1.+1.j)",
    ),
    "no state": (
        lambda: loaded(lambda state: state.clear()),
        "state must be of a Rewind with {'window': 256, 'every': 16}, got None",
    ),
    "other window": (
        lambda: loaded(lambda state: state["options"].update(window=64)),
        "state must be of a Rewind with {'window': 256, 'every': 16}, got {'window': 64, "
        "'every': 16}",
    ),
    "other model": (
        lambda: loaded(lambda state: state["trusted"]["model"].update(weight=torch.ones(9))),
        "state must be of this model, with weight of shape (1, 2), got shape (9,)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_refuses(what):
    call, sentence = WRONG[what]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == sentence


def test_a_step_in_the_capture_of_a_graph_is_refused(monkeypatch):
    model, optimizer = model_and_sgd()
    rewind = Rewind(model, optimizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError) as error:
        optimizer.step()
    assert str(error.value) == (
        "optimizer.step must be called outside of a CUDA graph for Rewind, got a step in its "
        "capture: no hooks run where it is replayed (capture only forward and backward)"
    )
    rewind.close()
    optimizer.step()


@pytest.mark.parametrize("copies", [copy.deepcopy, copy.copy])
def test_it_is_not_copied(copies):
    rewind = Rewind(*model_and_sgd())
    with pytest.raises(ValueError, match=r"^a Rewind can't be copied or pickled: "):
        copies(rewind)
