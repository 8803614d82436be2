"""Whether one model is better than another on held-out data, minibatch by minibatch."""

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lossguard.torch.arguments import scalar
from lossguard.torch.distributed import mean_of_ranks
from lossguard.torch.process import modes_kept

if TYPE_CHECKING:
    from lossguard.torch.rewind.store import Live, Snapshot

ROUND, MOST = 8, 16
"""Minibatches that are compared at once, and in all."""
ERRORS = 3.0
"""Standard errors of the mean difference that decide."""


def is_better(
    audit: Callable[[int], Any],
    live: "Live",
    suspect: "Snapshot",
    snapshot: "Snapshot",
    group: Any,
) -> bool:
    """Whether a snapshot has lower losses than a suspect, by three standard errors of the mean of
    the differences on the same minibatches; it decides after 8 or 16. Afterwards the model is
    at one of the two.

    Of two that are equally good, with normal differences, that is so in 1.3 % of all cases.
    """
    differences: list[float] = []
    while len(differences) < MOST:
        numbers = range(len(differences), len(differences) + ROUND)
        losses: list[list[float]] = []
        for one in (suspect, snapshot):
            live.set_back(one.content)
            losses.append(_losses(audit, live, numbers, group))
        for before, now in zip(*losses, strict=True):
            if not math.isfinite(now):
                return False
            differences.append(before - now)
        if not all(map(math.isfinite, differences)):  # the suspect's alone
            return True
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        if abs(mean) > ERRORS * error:
            return mean > 0
    return False


@torch.no_grad()
def _losses(audit: Callable[[int], Any], live: "Live", numbers: range, group: Any) -> list[float]:
    with modes_kept(live.model):
        losses = [scalar(audit(k), "audit must return one number") for k in numbers]
    return mean_of_ranks(torch.stack([loss.double() for loss in losses]), group).tolist()
