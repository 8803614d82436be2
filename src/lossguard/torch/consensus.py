"""Numbers on which every rank agrees, so that every rank takes the same decision."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from lossguard.torch.lane import Lane
from lossguard.torch.tensors import local, read
from lossguard.torch.weights import Weights


class Outcome(NamedTuple):
    """What a cycle has shown of the lanes that ran, in their order.

    Attributes:
        checks: check losses, means over the ranks.
        trains: training losses, likewise.
        held: training losses of b, likewise, where a ratchet asks for them.
        sound: whether parameters and buffers are finite, on every rank.
        broken: whether the optimizer's memory isn't finite, on any rank.
    """

    checks: list[list[float]]
    trains: list[list[float]]
    held: list[float]
    sound: list[bool]
    broken: list[bool]


def outcome(
    lanes: Sequence[Lane],
    held: list[Tensor],
    weights: Weights,
    group: distributed.ProcessGroup | None,
) -> Outcome:
    """What the ranks of ``group`` agree on about some lanes, and about the losses of b."""
    losses = [*(lane.check for lane in lanes), *(lane.train for lane in lanes), held]
    numbers, alarms = agree(
        read([loss for row in losses for loss in row]),
        [
            *(not weights.is_finite(lane.copy) for lane in lanes),
            *(not lane.remembers_soundly() for lane in lanes),
        ],
        group,
        local(weights.params[0]).device,
    )
    agreed = iter(numbers)
    rows = [[next(agreed) for _ in row] for row in losses]
    count = len(lanes)
    sound = [not alarm for alarm in alarms[:count]]
    return Outcome(rows[:count], rows[count:-1], rows[-1], sound, alarms[count:])


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
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(means), list(alarms)
    packed = torch.tensor([*means, *map(float, alarms)], dtype=torch.float64, device=device)
    distributed.all_reduce(packed, group=group)
    totals = packed.tolist()
    size = distributed.get_world_size(group)
    return [t / size for t in totals[: len(means)]], [t > 0 for t in totals[len(means) :]]
