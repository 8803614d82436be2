"""Numbers on which every rank agrees, so that every rank takes the same decision."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def several(group: distributed.ProcessGroup | None) -> bool:
    """Whether there are other ranks."""
    running = distributed.is_available() and distributed.is_initialized()
    return running and distributed.get_world_size(group) > 1


def mean_of_ranks(numbers: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """The mean of each number over the ranks: one all-reduce, which every rank has to reach.

    Ranks weigh the same whatever the sizes of their shards, as in DistributedDataParallel's mean of
    gradients.
    """
    if not several(group):
        return numbers
    distributed.all_reduce(numbers, group=group)
    return numbers / distributed.get_world_size(group)


def agree(
    means: Sequence[float],
    alarms: Sequence[bool],
    group: distributed.ProcessGroup | None,
    device: torch.device,
) -> tuple[list[float], list[bool]]:
    """The mean of each number over the ranks, and whether any rank raised each alarm.

    >>> agree([0.5, 2.0], [False, True], None, torch.device("cpu"))
    ([0.5, 2.0], [False, True])
    """
    if not several(group):
        return list(means), list(alarms)
    packed = torch.tensor([*means, *map(float, alarms)], dtype=torch.float64, device=device)
    agreed = mean_of_ranks(packed, group).tolist()
    return agreed[: len(means)], [one > 0 for one in agreed[len(means) :]]
