"""Numbers on which every rank agrees, so that every rank takes the same decision."""

from collections.abc import Sequence

import torch
from torch import distributed


def several(group: distributed.ProcessGroup | None) -> bool:
    """Whether there are other ranks."""
    running = distributed.is_available() and distributed.is_initialized()
    return running and distributed.get_world_size(group) > 1


def agree(
    means: Sequence[float],
    alarms: Sequence[bool],
    group: distributed.ProcessGroup | None,
    device: torch.device,
) -> tuple[list[float], list[bool]]:
    """The mean of each number over the ranks, and whether any rank raised each alarm.

    One all-reduce of a short vector, which every rank has to reach. Ranks weigh the same whatever
    the sizes of their shards, as in DistributedDataParallel's mean of gradients. Without
    ``torch.distributed`` the arguments come back as they are.

    >>> agree([0.5, 2.0], [False, True], None, torch.device("cpu"))
    ([0.5, 2.0], [False, True])
    """
    if not several(group):
        return list(means), list(alarms)
    packed = torch.tensor([*means, *map(float, alarms)], dtype=torch.float64, device=device)
    distributed.all_reduce(packed, group=group)
    totals = packed.tolist()
    size = distributed.get_world_size(group)
    return [t / size for t in totals[: len(means)]], [t > 0 for t in totals[len(means) :]]
