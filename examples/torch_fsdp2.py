"""FSDP2 under ``Rewind``, with checkpoints from which another number of processes can go on.

torchrun --standalone --nproc-per-node 2 examples/torch_fsdp2.py
"""

import gc
from pathlib import Path

import torch
import tyro
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lossguard.torch import Rewind


def main(steps: int = 300, folder: Path = Path("checkpoint")) -> None:
    """Go on from the folder, train, save there. From step 150 to 160 the rate is too high."""
    cuda = torch.cuda.is_available()
    distributed.init_process_group("nccl" if cuda else "gloo")
    train(steps, folder, cuda)
    gc.collect()  # of the model, which holds the group, whose threads Python must outlive
    distributed.destroy_process_group()


def train(steps: int, folder: Path, cuda: bool) -> None:
    """All of it, in a function of its own, so that nothing is left of it afterwards."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)  # the same weights on all ranks
    model = nn.Sequential(
        nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    model.to(device)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rewind = Rewind(model, optimizer)

    def state() -> dict:
        weights, memory = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": memory, "rewind": rewind.state_dict(snapshots=False)}

    if folder.exists():
        saved = state()
        checkpoint.load(saved, checkpoint_id=folder)
        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
        )
        rewind.load_state_dict(saved["rewind"])
    begin = rewind.calls
    for step in range(begin, begin + steps):
        optimizer.param_groups[0]["lr"] = 0.3 if 150 <= step < 160 else 3e-3
        draw = torch.Generator().manual_seed(ranks * step + rank)  # each rank its own minibatch
        x = torch.randn(64, 16, generator=draw).to(device)
        loss = nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rewind.observe(loss)  # on every rank: all decide alike
        if rank == 0 and step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, returns {rewind.returns}", flush=True)
    checkpoint.save(state(), checkpoint_id=folder)
    distributed.barrier()


if __name__ == "__main__":
    tyro.cli(main)
