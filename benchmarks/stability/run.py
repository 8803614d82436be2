"""One run and its record, and what a step costs.

Letters: G gradients a run may evaluate.
"""

import gc
import math
import statistics
import time
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .faults import CLEAN, Fault, Happening
from .methods import METHODS, Method, Schedule
from .tasks import Batch, Task

MARKS = 40
"""Evaluations of held-out data in a run, evenly over its gradients."""
STATISTICS = 50
"""Minibatches from which BatchNorm's are computed again, as schedulefree's page asks."""
BLOCK = 64
"""Minibatches between two looks at the clock: all periods of ``Rewind`` divide it."""


class Training:
    """A model under a method, fed minibatch by minibatch.

    Attributes:
        spent: gradients evaluated so far, in all lanes.
        taken: minibatches so far.
    """

    def __init__(self, task: Task, method: str, fault: Fault, rate: float, seed: int) -> None:
        self.task, self.seed = task, seed
        self.spent = self.taken = 0
        self._happening = Happening(fault, task.classes)
        self._batch: Batch
        torch.manual_seed(seed)
        self.model: nn.Module = task.model()

        def scheduled(optimizer: Any) -> Schedule:
            return Schedule(optimizer, lambda: self._happening.factor)

        self.method: Method = METHODS[method](self.model, rate * fault.rate, scheduled)

    def step(self) -> None:
        """Take one minibatch, as the fault leaves it, at the rate that the schedule has for it."""
        random = np.random.default_rng([self.seed, self.taken])
        batch = self.task.draw(random)
        part = self.spent / self.task.gradients
        self._batch = self._happening.strike(batch, self.taken, part, random)
        self.method.schedule.step()
        self.method.step(self._gradient)
        self.taken += 1

    def held_loss(self) -> float:
        """Of the model as it would be saved now."""
        average = self.method.average
        if average is not None:
            average.eval()
            self._renew_statistics()
        self.model.eval()
        with torch.no_grad():
            loss = _loss(self.model, self.task.held).item()
        self.model.train()
        if average is not None:
            average.train()
        return loss

    def _renew_statistics(self) -> None:
        """Those of BatchNorm, which are of the parameters that are trained, not of the average."""
        if any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in self.model.modules()):
            random = np.random.default_rng(self.seed)
            with torch.no_grad():
                for _ in range(STATISTICS):
                    self.model(self.task.draw(random)[0])

    def forget(self) -> None:
        """Let go of the last minibatch and its gradients."""
        self._batch = (torch.empty(0), torch.empty(0))
        self.model.zero_grad(set_to_none=True)

    def _gradient(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = _loss(self.model, self._batch)
        loss.backward()
        self.spent += 1
        if self._happening.nan:
            next(p.grad for p in self.model.parameters() if p.grad is not None).fill_(math.nan)
        return loss.detach()


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    x, t = batch
    return cross_entropy(model(x).flatten(0, -2), t.flatten())


def held_bytes() -> int:
    """Of all tensors that hold numbers, not those of a compiler; gradients apart."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    storages = [one.untyped_storage() for one in tensors if one.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def record(task: Task, method: str, fault: Fault, rate: float, seed: int) -> dict[str, Any]:
    """A run to the end. An error ends it, and is a part of the record."""
    error, curve, seconds = "", [], 0.0
    training = Training(task, method, fault, rate, seed)
    start = training.held_loss()
    try:
        for mark in range(1, MARKS + 1):
            begin = time.process_time()
            while training.spent < mark / MARKS * task.gradients:
                training.step()
            seconds += time.process_time() - begin
            curve.append((training.spent, round(training.held_loss(), 5)))
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}".splitlines()[0][:200]
    return {
        "rate": rate * fault.rate,
        "start": start,
        "curve": curve,
        "minibatches": training.taken,
        "seconds": round(seconds, 4),
        "acted": training.method.acted(),
        "error": error,
    }


class Cost(NamedTuple):
    """Of a method on clean data.

    Attributes:
        time: of a gradient, all that the method does around it included, in units of AdamW's: the
            median over rounds of the ratio within a round.
        low, high: a quarter of the rounds is below, and above.
        copies: what is held between steps, the model included, in copies of its parameters.
    """

    time: float
    low: float
    high: float
    copies: float


def costs(task: Task, rates: dict[str, float], rounds: int, seed: int) -> dict[str, Cost]:
    """All methods in turns, so that what else the machine does hits all alike; CPU seconds."""
    runs: dict[str, Training] = {}
    held = {"": held_bytes()}
    for name, rate in rates.items():
        runs[name] = Training(task, name, CLEAN, rate, seed)
        for _ in range(3):  # snapshots and lanes are there by then
            _seconds(runs[name])
        runs[name].forget()
        held[name] = held_bytes()
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        times = {name: _seconds(training) for name, training in runs.items()}
        for name, seconds in times.items():
            ratios[name].append(seconds / times["AdamW"])
    weights = sum(p.nbytes for p in runs["AdamW"].model.parameters())
    copies = [(after - before) / weights for before, after in pairwise(held.values())]
    found = {}
    for (name, values), own in zip(ratios.items(), copies, strict=True):
        low, median, high = statistics.quantiles(values, n=4)
        found[name] = Cost(median, low, high, round(own, 2))
    return found


def _seconds(training: Training) -> float:
    """CPU seconds a gradient, over a block of minibatches."""
    spent, begin = training.spent, time.process_time()
    for _ in range(BLOCK):
        training.step()
    return (time.process_time() - begin) / (training.spent - spent)
