"""What each rank of a distributed test does; it returns what the test compares."""

import datetime
import math
import os

import torch
from models import check_of, loss_fn, mlp, run, spiral
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed import fsdp as sharding
from torch.distributed.checkpoint import state_dict as names
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

from lossguard.torch import BestOf, LossGuard, Recommended

NT, BATCH, COUNT = 3, 24, 60
KINDS = {kind.__name__: kind for kind in (BestOf, LossGuard, Recommended)}


def build(kind, model, **options):
    params = list(model.parameters())
    bold, careful = Adam(params, lr=0.05), SGD(params, lr=0.2, momentum=0.9)
    if kind == "BestOf":
        return BestOf([careful, bold], model=model, nt=NT, decay=0.5, **options)
    more = {"check": check_of(model), "nc": 2} if kind == "LossGuard" else {"share": 0.3}
    return KINDS[kind](bold, careful, model=model, nt=NT, **more | options)


def data():
    """The same minibatches on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return [spiral(BATCH) for _ in range(COUNT)]


def shards(rank, size, sizes=None):
    """This rank's part of each minibatch, ``sizes[rank]`` examples of it."""
    sizes = sizes or [BATCH // size] * size
    start = sum(sizes[:rank])
    return [tuple(t[start : start + sizes[rank]] for t in batch) for batch in data()]


def report(guard, model):
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.items()}
    return {"history": [d._asdict() for d in guard.history], "model": state}


def alone(kind):
    """One process, on the whole minibatches."""
    torch.manual_seed(0)
    model = mlp()
    guard = build(kind, model)
    run(guard, model, data())
    return report(guard, model.state_dict())


def ddp(rank, kind, sizes=None, group=None):
    """The same on every rank, each on its part of the minibatches."""
    model = DistributedDataParallel(mlp(), process_group=group)
    guard = build(kind, model, process_group=group)
    run(guard, model, shards(rank, distributed.get_world_size(group), sizes))
    return report(guard, model.module.state_dict())


def ddp_nan(rank):
    """Rank 1's check loss is NaN: the learned branch's in the second cycle, both in the third."""
    model = DistributedDataParallel(mlp())
    clean = check_of(model)

    def check(k):
        cycle, learned = k // 2, guard._live.holder.name == "y"
        poisoned = rank == 1 and (cycle == 2 or (cycle == 1 and learned))
        return clean(k) * math.nan if poisoned else clean(k)

    guard = build("LossGuard", model, check=check)
    run(guard, model, shards(rank, distributed.get_world_size()))
    return report(guard, model.module.state_dict())


def ddp_raises(rank):
    """What a lane raises is passed on, as other ranks would wait for it; the message."""
    model = DistributedDataParallel(mlp())
    guard = build("LossGuard", model)
    batches = shards(rank, distributed.get_world_size())
    run(guard, model, batches[:1])
    with torch.no_grad():
        guard._lanes["y"].values[0].fill_(math.nan)

    def closure():
        loss = loss_fn(model, batches[1])
        loss.backward()
        if not loss.isfinite():
            raise ValueError("mine")
        return loss

    try:
        guard.step(closure)
    except ValueError as error:
        return str(error)


def in_groups(rank):
    """Four of six ranks together; then three pairs, in which one rank is lost in its own way."""
    torch.manual_seed(0)
    wait = datetime.timedelta(seconds=600)
    members = ([0, 1, 2, 3], [0, 1], [2, 3], [4, 5])
    four, *pairs = (distributed.new_group(ranks, timeout=wait) for ranks in members)
    if rank < 4:
        answer = ddp(rank, "LossGuard", group=four)
        torch.save(answer, f"{os.environ['CHECKPOINTS']}/{rank}.pt")
    group = pairs[rank // 2]
    model = DistributedDataParallel(mlp(), process_group=group)
    guard = build("LossGuard", model, process_group=group)
    batches = shards(rank % 2, 2)
    run(guard, model, batches[:9])
    if rank == 1:  # dies just before a decision
        os._exit(9)
    if rank == 3:
        guard.step(lambda: {}["mine"])
    if rank != 5:  # which has fewer minibatches
        run(guard, model, batches[9:])


def sharded(reshard=False):
    """The model in shards; its root, which holds the last layer, stays gathered after a forward."""
    model = mlp()
    sharding.fully_shard(model[0], reshard_after_forward=reshard)
    sharding.fully_shard(model)
    return model


def fsdp(rank, kind):
    model = sharded()
    guard = build(kind, model)
    run(guard, model, shards(rank, distributed.get_world_size()))
    return {
        **report(guard, model.state_dict()),
        "shard": sum(t.numel() for t in guard._leader.point),
        "whole": sum(p.numel() for p in model.parameters()),
    }


def fsdp_needs_the_model(rank):
    model = mlp()
    sharding.fully_shard(model)
    params = list(model.parameters())
    try:
        Recommended(SGD(params, lr=0.1), SGD(params, lr=0.1), model=None)
    except ValueError as error:
        return str(error)


def fsdp_foreign(rank):
    """What a guard says of the file that torch.save wrote on this rank, and on the other one."""
    model = sharded()
    guard = build("Recommended", model)
    run(guard, model, shards(rank, 2)[:7])
    files = [f"{os.environ['CHECKPOINTS']}/of{k}.pt" for k in range(2)]
    torch.save(guard.state_dict(), files[rank])
    distributed.barrier()
    guard.load_state_dict(torch.load(files[rank], weights_only=False))
    try:
        guard.load_state_dict(torch.load(files[1 - rank], weights_only=False))
    except ValueError as error:
        return str(error)


def whole():
    return DistributedDataParallel(mlp())


def states(model, guard):
    ours, of_guard = names.get_model_state_dict(model), names.get_optimizer_state_dict(model, guard)
    return {"model": ours, "guard": of_guard}


def loaded(kind, model, folder):
    """A guard of a fresh model, both of which are then as saved."""
    guard = build(kind, model)
    state = states(model, guard)
    checkpoint.load(state, checkpoint_id=folder)
    names.set_model_state_dict(model, state["model"])
    names.set_optimizer_state_dict(model, guard, state["guard"])
    return guard


def saved_and_loaded(rank, kind, make, folder):
    """torch.distributed.checkpoint between two cycles: whether a fresh guard goes on bit by bit."""
    batches = shards(rank, distributed.get_world_size())
    model = make()
    guard = build(kind, model)
    run(guard, model, batches[:30])
    checkpoint.save(states(model, guard), checkpoint_id=folder)
    run(guard, model, batches[30:])

    torch.manual_seed(9)
    twin = make()
    other = loaded(kind, twin, folder)
    run(other, twin, batches[30:])
    return [report(guard, model.state_dict()), report(other, twin.state_dict())]


def two(rank):
    """All that two ranks are asked, one after the other."""
    answers = {}

    def ask(name, scenario, *args):
        torch.manual_seed(0)
        answers[name] = scenario(rank, *args)

    for kind in KINDS:
        ask(f"ddp {kind}", ddp, kind)
        ask(f"fsdp {kind}", fsdp, kind)
        folder = os.environ["CHECKPOINTS"]
        ask(f"dcp {kind}", saved_and_loaded, kind, sharded, f"{folder}/{kind}")
    ask("unequal", ddp, "LossGuard", [16, 8])
    ask("dcp whole", saved_and_loaded, "Recommended", whole, f"{folder}/whole")
    for scenario in (ddp_nan, ddp_raises, fsdp_needs_the_model, fsdp_foreign):
        ask(scenario.__name__, scenario)
    return answers


def one(rank):
    """A checkpoint of two ranks goes on in one; what is there then."""
    torch.manual_seed(9)
    answers = {}
    for kind in KINDS:
        model = sharded()
        guard = loaded(kind, model, f"{os.environ['CHECKPOINTS']}/{kind}")
        run(guard, model, data()[30:])
        answers[kind] = report(guard, model.state_dict())
    return answers
