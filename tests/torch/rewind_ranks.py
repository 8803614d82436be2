"""What two ranks do: ``Rewind`` decides the same on both, and copies their shards."""

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import refuses
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lossguard.torch import Rewind
from lossguard.torch.distributed import mean_of_ranks
from lossguard.torch.integrations import trainer_rewind

EVERY, STEPS = 8, 240
FAULT = range(140, 172)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def train(rewind, model, optimizer, first, last, rank):
    """Steps of both go up in the fault; of rank 1 one has a gradient that isn't finite at 50."""
    for i in range(first, last):
        rng = torch.Generator().manual_seed(2 * i + rank)
        x = torch.randn(8, 8, generator=rng)
        loss = (model(x)[:, 0] - x[:, 0]).square().mean()
        optimizer.zero_grad()
        sign = -1 if i in FAULT else 1
        (loss * (torch.nan if i == 50 and rank == 1 else sign)).backward()
        optimizer.step()
        rewind.observe(loss)


def whole(model):
    full = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [p.detach().clone() for p in full]


def averaged(rank, sharded):
    """Both kinds of data parallelism; the run's numbers must be the same on all ranks."""
    model = network()
    if sharded:
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rewind = Rewind(model, optimizer, every=EVERY)
    train(rewind, model, optimizer, 0, STEPS, rank)
    numbers = (rewind.returns, rewind.discarded, rewind.skipped, rewind.scale)
    return numbers, [[*event] for event in rewind.events], whole(model)


def in_a_trainer(rank):
    """A checkpoint of one process is resumed by two."""
    model, folder = network(), Path(os.environ["CHECKPOINTS"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    checkpoint = folder / "checkpoint-20"
    state = SimpleNamespace(global_step=20)
    args = SimpleNamespace(output_dir=folder, process_index=rank)
    if rank == 0:
        checkpoint.mkdir()
        torch.save({}, checkpoint / "rewind-0.pt")
    distributed.barrier()
    trainer = SimpleNamespace(compute_loss=None, train=None, add_callback=lambda one: None)
    callback = trainer_rewind(trainer, every=EVERY)
    told = "begins anew, as there is no .* on every rank"
    with pytest.warns(RuntimeWarning, match=told):
        callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)


def moved(rank, alone=False):
    """Whether a parameter moves on this rank, though a number in a shard of rank 0 isn't finite.

    ``alone``: which has no gradient then on the other rank.
    """
    model = network()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewind = Rewind(model, optimizer, every=1)
    before = whole(model)
    model(torch.ones(8, 8)).square().mean().backward()
    if rank == 0:
        model[0].weight.grad.to_local()[0, 0] = torch.inf
    elif alone:
        optimizer.zero_grad()
    optimizer.step()
    rewind.observe(1.0)
    assert rewind.skipped == 1
    return not all(map(torch.equal, before, whole(model)))


def resumed(rank, folder):
    """Shards of fully_shard: each rank's own file, and on to the same end."""

    def start():
        model = network()
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, Rewind(model, optimizer, every=EVERY)

    model, optimizer, rewind = start()
    train(rewind, model, optimizer, 0, 150, rank)
    files = [Path(folder) / f"of{k}.pt" for k in range(2)]
    torch.save(rewind.state_dict(), files[rank])
    parts = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(rewind, model, optimizer, 150, STEPS, rank)
    distributed.barrier()

    twin, its_optimizer, again = start()
    twin.load_state_dict(parts[0])
    its_optimizer.load_state_dict(parts[1])
    again.load_state_dict(torch.load(files[rank], weights_only=False))
    train(again, twin, its_optimizer, 150, STEPS, rank)
    assert again.returns == rewind.returns == 1
    assert all(map(torch.equal, whole(twin), whole(model)))
    with refuses(f"state must be of rank {rank}'s own shards, got rank"):
        again.load_state_dict(torch.load(files[1 - rank], weights_only=False))


def both(rank):
    """What the ranks must agree on; and a checkpoint that goes on."""
    results = {kind: averaged(rank, kind == "sharded") for kind in ("replicated", "sharded")}
    resumed(rank, os.environ["CHECKPOINTS"])
    numbers = torch.tensor([1.0 + rank], dtype=(torch.float32, torch.float64)[rank])
    results["mean"] = mean_of_ranks(numbers, None).tolist()  # as of ranks on other devices
    return results | {"moved": moved(rank), "alone": moved(rank, alone=True)}
