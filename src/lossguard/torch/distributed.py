"""Several ranks: numbers on which all agree, and shards that belong to one."""

from typing import Any

import torch
from torch import Tensor, distributed


def are_running() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def several(group: distributed.ProcessGroup | None) -> bool:
    return are_running() and distributed.get_world_size(group) > 1


def this_rank() -> int:
    return distributed.get_rank() if are_running() else 0


def mean_of_ranks(numbers: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """The mean of each number over the ranks: one all-reduce, which every rank has to reach.

    It is on the host if the group has a backend for it, wherever the numbers are and of whatever
    dtype: ranks may differ. They weigh the same whatever the sizes of their shards, as in
    DistributedDataParallel's mean of gradients.
    """
    if not several(group):
        return numbers
    backends = distributed.get_backend_config(group).split(",")  # such as cpu:gloo,cuda:nccl
    kinds = [one.split(":")[0] for one in backends]
    kind = "cpu" if "cpu" in kinds else kinds[0]
    if kind == "cpu":
        numbers = numbers.to(kind, torch.float64)
    elif numbers.device.type != kind:  # that of this kind that a rank is on may not be current
        numbers = numbers.to(kind)
    distributed.all_reduce(numbers, group=group)
    return numbers / distributed.get_world_size(group)


def check_rank(ours: Tensor, saved: Any, rank: int, name: str) -> None:
    """Refuse a shard that ``torch.save`` wrote on another rank: it looks like this rank's own.

    What torch.distributed.checkpoint loads has been put in place on this rank.
    """
    mesh, here = getattr(saved, "device_mesh", None), this_rank()
    if mesh is not None and mesh is not getattr(ours, "device_mesh", None) and rank != here:
        raise ValueError(
            f"{name} must be of rank {here}'s own shards, got rank {rank}'s (save and load by "
            "torch.distributed.checkpoint)"
        )


def sharded_as(p: Tensor, value: Tensor) -> Tensor:
    """This rank's shard as a part of a distributed tensor, if the parameter is one."""
    if not hasattr(p, "to_local"):
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # pyright: ignore
    return DTensor.from_local(value, mesh, placements, shape=p.shape, stride=p.stride())
