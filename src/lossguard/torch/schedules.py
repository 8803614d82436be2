"""Learning-rate schedules within a run of minibatches that lanes take one after the other."""

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from lossguard.torch.lane import Lane


class Schedules:
    """Steps each scheduler once per train minibatch, with the first lane that runs its optimizer.

    A second lane of the same optimizer is shown the rates that the first one had.
    """

    def __init__(self, schedulers: Sequence[LRScheduler]) -> None:
        self.schedulers = schedulers
        self._seen: dict[int, list[list[dict[str, Any]]]] = {}
        self._leaders: dict[int, Lane] = {}

    def before(self, lane: Lane, k: int) -> None:
        """Before a lane's step on the run's train minibatch number k."""
        inner = lane.inner
        if self._leaders.setdefault(id(inner), lane) is lane:
            self._seen.setdefault(id(inner), [inner.schedule()])
        else:
            inner.follow(self._seen[id(inner)][k])

    def undo(self, lane: Lane) -> None:
        """After an error in the step: the optimizer's rates are those that the first lane left."""
        inner = lane.inner
        if self._leaders.get(id(inner), lane) is not lane:
            inner.follow(self._seen[id(inner)][-1])

    def after(self, lane: Lane, k: int) -> None:
        """After it."""
        inner = lane.inner
        seen = self._seen[id(inner)]
        if self._leaders[id(inner)] is not lane:
            inner.follow(seen[k + 1])
            return
        for scheduler in self.schedulers:
            if scheduler.optimizer is inner.optimizer:
                scheduler.step()
        seen.append(inner.schedule())
