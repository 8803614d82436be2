"""What ``Rewind`` refuses, in one sentence each."""

import copy
import math

import pytest
import torch
from models import refuses
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.optim import SGD, lr_scheduler

from lossguard.torch import Recommended, Rewind
from lossguard.validation import told

HADNT = "optimizer must train parameters that the model has when Rewind is built, got one of shape"
OF_TWO = "(nn.ModuleList([model, loss]) has those of two)"
AROUND = (
    "optimizer must keep all that it remembers in its state, got SGD around SGD (build the "
    "optimizer without SGD; if that only holds several, give Rewind a list of these)"
)


def model_and_sgd(**marks):
    """``marks`` are attributes of the weight."""
    model = nn.Linear(2, 1)
    for name, value in marks.items():
        setattr(model.weight, name, value)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def around(**inside):
    """An optimizer that holds others."""
    model, outer = model_and_sgd()
    vars(outer).update(inside)
    return Rewind(model, outer)


def guard_of(model, optimizer):
    return Recommended(torch.optim.Adam(model.parameters()), optimizer, model=model)


def later():
    model, optimizer = model_and_sgd()
    rewind = Rewind(model, optimizer, every=16)
    model.more = nn.Linear(1, 1, bias=False)
    optimizer.add_param_group({"params": model.more.parameters()})
    for _ in range(64):
        optimizer.step()
        rewind.observe(1.0)


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


def without_a_rate(model, optimizer):
    optimizer.param_groups[0]["lr"] = None  # as Adafactor of transformers has it
    Rewind(model, optimizer)


FLAT = (
    "model must be sharded by fully_shard, if it is, got FullyShardedDataParallel, whose "
    "parameters are parts of flat ones"
)
# The sentence, and what is refused with it, of a model and its optimizer.
WRONG = [
    (
        "model must be a Module such as nn.Linear(2, 1), got 'model'",
        lambda m, o: Rewind("model", o),
    ),
    (
        "optimizer must be an Optimizer such as torch.optim.AdamW(model.parameters()), got None",
        lambda m, o: Rewind(m, None),
    ),
    (
        f"{HADNT} (3,) that it hadn't {OF_TWO}",
        lambda m, o: Rewind(m, SGD([nn.Parameter(torch.ones(3))])),
    ),
    ("optimizer must have a rate, lr, in each of its groups, got one without", without_a_rate),
    (AROUND, lambda m, o: around(optimizer=o)),  # as Lookahead has one
    (AROUND, lambda m, o: around(parts={"one": [o]})),  # as containers of optimizers have them
    (f"{HADNT} (1, 1) that it hadn't {OF_TWO}", lambda m, o: later()),
    ("optimizer must be no guard, got a Recommended", lambda m, o: Rewind(m, guard_of(m, o))),
    (
        "optimizer must be no guard's, got one of a Recommended",
        lambda m, o: [guard_of(m, o), Rewind(m, o)],
    ),
    (
        "fallback must be watched by no Rewind, got one that is (close it)",
        lambda m, o: [Rewind(m, o), guard_of(m, o)],
    ),
    (
        "also must be of this optimizer, if of any, got one of another, a StepLR",
        lambda m, o: Rewind(m, o, also=[lr_scheduler.StepLR(model_and_sgd()[1], 5)]),
    ),
    (
        "also must be objects with a state_dict, got float",
        lambda m, o: Rewind(m, o, also=[1.0]),
    ),
    (
        "optimizers must train different parameters, got two that train weight",
        lambda m, o: Rewind(m, [o, torch.optim.Adam(m.parameters())]),
    ),
    ("optimizers must each be given once, got one twice", lambda m, o: Rewind(m, [o, o])),
    (FLAT, lambda m, o: flattened()),
    (
        "model must be finite, got one that isn't",
        lambda m, o: [nn.init.constant_(m.weight, math.nan), Rewind(m, o)],
    ),
]


@pytest.mark.parametrize(("sentence", "call"), WRONG)
def test_what_it_refuses(sentence, call):
    with refuses(sentence, "$"):
        call(*model_and_sgd())


@pytest.mark.parametrize("build", [lambda m, o: Rewind(m, o), guard_of])
def test_what_holds_no_numbers_is_refused_by_pytorch(build):
    empty = [
        nn.Linear(2, 1, device="meta"),
        nn.LazyLinear(1),
        nn.Sequential(nn.Linear(2, 1), nn.LazyBatchNorm1d(affine=False)),
    ]
    for model in empty:
        with pytest.raises((RuntimeError, ValueError), match=r"meta tensors|uninitialized"):
            build(model, SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("offload", "folder", "be True or False, got 'folder'"),
        ("audit", 3, "be None or a function, got 3"),
        ("action", "tell", 'be "rewind" or "log", got \'tell\''),
        ("every", 65, "be at most 64, got 65"),
        ("rho", 1.0, "be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_that_it_refuses(option, value, rule):
    with refuses(f"{option} must {rule}", "$"):
        Rewind(*model_and_sgd(), **{option: value})


@pytest.mark.parametrize(
    "loss",
    [
        torch.ones(3),
        torch.tensor(1 + 1j),
        torch.ones((), device="meta"),
        torch.ones(1).to_sparse(),
        10**400,
    ],
)
def test_losses_that_it_refuses(loss):
    with refuses(f"loss must be one number, got {told(loss)}", "$"):
        Rewind(*model_and_sgd()).observe(loss)


OPTIONS = {"optimizers": 1, "also": 0, "offload": False}
OURS = f"state must be of a Rewind with {OPTIONS}, got"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.clear(), "state must be of version 2, got None"),
        (lambda s: s["options"].update(also=1), f"{OURS} {OPTIONS | {'also': 1}}"),
        (
            lambda s: s["store"]["snapshots"][0][-1]["model"].update(weight=torch.ones(9)),
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
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
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
