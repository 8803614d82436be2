"""What each rank of a distributed test does; it returns what the test compares."""

import math
import os

import torch
from models import loss_fn, mlp, run, spiral
from torch import distributed
from torch.distributed import fsdp as sharding
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

from lossguard.torch import BestOf, LossGuard, backoff, ratchet, sequential_criterion, track_record

CYCLES, NT, NC, BATCH = 6, 3, 2, 24


def build(params, lr=0.1, **options):
    params = list(params)
    return LossGuard(
        Adam(params, lr=lr), SGD(params, lr=0.5, momentum=0.9), nt=NT, nc=NC, **options
    )


def data():
    """The same minibatches on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return [spiral(BATCH) for _ in range(CYCLES * (NT + NC))]


def shards(rank, size, sizes=None):
    """This rank's part of each minibatch, ``sizes[rank]`` examples of it."""
    sizes = sizes or [BATCH // size] * size
    start = sum(sizes[:rank])
    return [tuple(t[start : start + sizes[rank]] for t in batch) for batch in data()]


def report(guard, model):
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.items()}
    return {"history": [d._asdict() for d in guard.history], "model": state}


def alone(make):
    """One process, on the whole minibatches, with the guard that ``make`` makes of a model."""
    model = mlp()
    guard = make(model)
    run(guard, model, data())
    return report(guard, model.state_dict())


def together(make, rank, sizes=None):
    """The same on every rank, each on its part of the minibatches."""
    model = DistributedDataParallel(mlp())
    guard = make(model)
    run(guard, model, shards(rank, distributed.get_world_size(), sizes))
    return report(guard, model.module.state_dict())


def by_loss_guard(model):
    return build(model.parameters(), model=model)


def ddp(rank, sizes=None):
    return together(by_loss_guard, rank, sizes)


def beyond_the_paper(model):
    return build(
        model.parameters(),
        lr=1e-3,
        hedge=True,
        criterion=sequential_criterion(confidence=0.8, first=2, most=8),
        probing=backoff(patience=1, most=1),
    )


def ddp_beyond_the_paper(rank):
    """Ranks look again, and back off, together."""
    return together(beyond_the_paper, rank)


def by_track_record(model):
    """x leaves the fallback's own path and goes back, by losses of which a rank sees a part."""
    return LossGuard(
        Adam(model.parameters(), lr=0.02), Adam(model.parameters(), lr=0.05), nt=NT, nc=NC,
        hedge=track_record(decay=0.5),
    )  # fmt: skip


def ddp_by_track_record(rank):
    return together(by_track_record, rank)


def by_ratchet(model):
    """x goes back to its best, by losses of which a rank sees a part."""
    params = list(model.parameters())
    rule = ratchet(cycles=1, tolerance=0.0)
    return LossGuard(
        Adam(params, lr=0.02), Adam(params, lr=0.3), nt=NT, nc=1, model=model, ratchet=rule
    )


def ddp_by_ratchet(rank):
    return together(by_ratchet, rank)


def by_best_of(model):
    """Paths of which now one, now the other has the lower losses."""
    params = list(model.parameters())
    bold, careful = Adam(params, lr=0.1), SGD(params, lr=0.5, momentum=0.9)
    return BestOf(bold, careful, nt=NT, decay=0.5, model=model)


def ddp_by_best_of(rank):
    return together(by_best_of, rank)


def ddp_unequal(rank):
    return ddp(rank, [16, 8])


def ddp_nan(rank):
    """Rank 1's loss of the learned branch is NaN in the second cycle, of both in the third."""
    model = DistributedDataParallel(mlp())
    guard = build(model.parameters())
    for i, batch in enumerate(shards(rank, distributed.get_world_size())):
        cycle, t = divmod(i, NT + NC)
        calls = 0

        def closure(batch=batch, cycle=cycle, t=t):
            nonlocal calls
            calls += 1
            guard.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            poisoned = rank == 1 and t >= NT and (cycle == 2 or (cycle == 1 and calls == 1))
            return loss * math.nan if poisoned else loss

        guard.step(closure)
    return report(guard, model.module.state_dict())


def ddp_killed(rank):
    """Rank 1 dies in the second cycle, just before the decision."""
    model = DistributedDataParallel(mlp())
    guard = build(model.parameters())
    batches = shards(rank, distributed.get_world_size())
    run(guard, model, batches[: 2 * (NT + NC) - 1])
    if rank == 1:
        os._exit(9)
    run(guard, model, batches[2 * (NT + NC) - 1 :])


def two(rank):
    """All that two ranks are asked, one after the other."""
    asked = (
        ddp, ddp_beyond_the_paper, ddp_by_track_record, ddp_by_ratchet, ddp_by_best_of,
        ddp_unequal, ddp_nan, fsdp, fsdp_by_best_of, fsdp_needs_the_model,
    )  # fmt: skip
    answers = {}
    for scenario in asked:
        torch.manual_seed(0)
        answers[scenario.__name__] = scenario(rank)
    return answers


def sharded():
    """The model in shards; its root, which holds the last layer, stays gathered after a forward."""
    model = mlp()
    sharding.fully_shard(model[0], reshard_after_forward=False)
    sharding.fully_shard(model)
    return model


def fsdp(rank):
    from torch.distributed.tensor.debug import CommDebugMode

    model = sharded()
    guard = build(model.parameters(), model=model)
    run(guard, model, shards(rank, distributed.get_world_size()))
    with CommDebugMode() as communication:
        copy = guard._weights.copy()
        guard._weights.copy_to(copy)
        guard._weights.copy_from(copy)
    return {
        **report(guard, model.state_dict()),
        "collectives": communication.get_total_counts(),
        "shard": sum(t.numel() for t in copy),
        "whole": sum(p.numel() for p in model.parameters()),
    }


def fsdp_by_best_of(rank):
    model = sharded()
    guard = by_best_of(model)
    run(guard, model, shards(rank, distributed.get_world_size()))
    return report(guard, model.state_dict())


def fsdp_needs_the_model(rank):
    model = mlp()
    sharding.fully_shard(model)
    try:
        build(model.parameters())
    except ValueError as error:
        return str(error)
