"""What an optimizer remembers of its own steps, told apart from its schedule.

state    the optimizer's ``state``: momentum, moments, step counters, LSTM cells
options  entries of its parameter groups that are no ``SETTINGS``, as schedule-free's ``k`` is none.
         Those (lr, betas, ...) are set from outside: every lane of the optimizer sees the same.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.rates import SETTINGS, same, set_back
from lossguard.torch.tensors import finite, local

Copy = list[Tensor]
"""Parameters first, then buffers; of a sharded parameter this rank's shard alone."""


class Memory(NamedTuple):
    """What an optimizer remembers: its ``state``, and the options of each parameter group."""

    state: dict[Any, Any]
    options: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Optimizer) -> "Memory":
        """What is in an optimizer now, itself."""
        options = [
            {key: value for key, value in group.items() if key not in SETTINGS}
            for group in optimizer.param_groups
        ]
        return cls(dict(optimizer.state), options)

    def put_into(self, optimizer: Optimizer) -> None:
        """Have an optimizer remember this itself; its schedule stays."""
        optimizer.state.clear()
        optimizer.state.update(self.state)
        set_back(optimizer.param_groups, self.options)

    def copy(self) -> "Memory":
        kept = {id(p): p for p in self.state}
        return copy.deepcopy(self, kept)

    def tensors_of(self, p: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is remembered of a parameter, as far as it is tensors, by name."""
        entries = self.state.get(p)
        if isinstance(entries, dict):
            for name, entry in entries.items():
                if isinstance(entry, Tensor):
                    yield name, local(entry)


class OwnMemory:
    """What one lane remembers: in its optimizer while the lane is in the model, else here.

    Some optimizers keep copies of the parameters in their state, such as master weights in
    float32. Where the lane is put somewhere else, they go along: else the next step would undo it.
    """

    def __init__(self, optimizer: Optimizer, params: list[Tensor], point: Copy, *, first: bool):
        """``first``: of the lanes of its optimizer, so that it remembers what that does."""
        self._optimizer, self._params = optimizer, params
        self._fresh = Memory.of(optimizer).copy()
        self._aside = None if first else self._fresh.copy()
        """None while it is in the optimizer."""
        # What schedule-free optimizers train at begins as a copy, and is none after a step.
        self._copies = {"z"} if callable(getattr(optimizer, "train", None)) else set[str]()
        self._copies |= self.copies_at(point)

    @property
    def now(self) -> Memory:
        """All of it, itself."""
        return Memory.of(self._optimizer) if self._aside is None else self._aside

    def become(self, memory: Memory) -> None:
        if self._aside is None:
            memory.put_into(self._optimizer)
        else:
            self._aside = memory

    def forget(self, point: Copy) -> None:
        """Be as when the guard was built, mostly nothing, of a lane at a point.

        The clock of a learned optimizer goes on.
        """
        memory = self._fresh.copy()
        for options, was in zip(memory.options, self.now.options, strict=False):
            options.update({"clock": was["clock"]} if "clock" in options else {})
        self.become(memory)
        self._move_copies(point)

    def go_along(self, start: Copy, point: Copy) -> None:
        """Have what holds the parameters be at a point, where the lane is put from another one."""
        self._copies |= self.copies_at(start)
        self._move_copies(point)

    def wind(self, clock: int, *, on: bool = False) -> None:
        """Set the clock of a learned optimizer, the steps of the run; or put it on by so much."""
        memory = self.now
        for options in memory.options:
            if "clock" in options:
                options["clock"] = clock + (options["clock"] if on else 0)
        self.become(memory)

    def is_finite(self) -> bool:
        """Whether every number is, except options that it was built with, such as bounds."""
        memory = self.now
        made = [
            [value for key, value in now.items() if not same(value, was.get(key))]
            for now, was in zip(memory.options, self._fresh.options, strict=False)
        ]
        return finite([*memory.state.values(), made])

    def go_in(self) -> None:
        """Into the optimizer."""
        if self._aside is not None:
            self._aside.put_into(self._optimizer)
            self._aside = None

    def go_out(self) -> None:
        """Out of it, for another lane."""
        self._aside = self.now

    def be_aside(self, memory: Memory) -> None:
        """Be another one, which isn't in the optimizer, whatever is."""
        self._aside = memory

    def copies_at(self, point: Copy) -> set[str]:
        """The names of entries that hold the parameters, where these are at a point."""
        memory, alike = self.now, dict[str, bool]()
        for p, value in zip(self._params, point, strict=False):
            for name, entry in memory.tensors_of(p):
                fits = entry.shape == value.shape and entry.layout is torch.strided
                if not fits or value.numel() == 1 or not alike.get(name, True):
                    continue
                if not torch.equal(entry.to(value), value):
                    alike[name] = False
                elif value.any():  # where both are 0, that says nothing
                    alike[name] = True
        return {name for name, everywhere in alike.items() if everywhere}

    def _move_copies(self, point: Copy) -> None:
        memory = self.now
        for p, value in zip(self._params, point, strict=False):
            for name, entry in memory.tensors_of(p):
                if name in self._copies and entry.shape == value.shape:
                    entry.copy_(value)


class Kept(NamedTuple):
    """All that a lane is, for a checkpoint."""

    values: Copy
    before: Copy
    """Where it was when the cycle began; empty if it need not go back."""
    memory: Memory
    blank: bool
    """Whether it remembers nothing, and ``memory`` shows only what there will be."""
    losses: list[float]
    warm_up: int
