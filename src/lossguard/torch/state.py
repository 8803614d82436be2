"""What an optimizer remembers of its own steps, told apart from its schedule.

state    the optimizer's ``state``: momentum, moments, step counters, LSTM cells
groups   entries of its parameter groups that are no ``SETTINGS``, as schedule-free's ``k`` is none.
         Those (lr, betas, ...) are set from outside: every lane of the optimizer sees the same.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.rates import (
    SETTINGS,
    copied_rate,
    options_of,
    same,
    set_back,
    set_rates,
)
from lossguard.torch.tensors import finite, local


class Memory(NamedTuple):
    """What an optimizer remembers: its ``state``, and the options of each parameter group."""

    state: dict[Any, Any]
    options: list[dict[str, Any]]

    def copy(self) -> "Memory":
        kept = {id(p): p for p in self.state}
        return copy.deepcopy(self, kept)


class Inner:
    """An optimizer whose memory can be copied, put back and exchanged.

    Attributes:
        optimizer: the optimizer itself; the guard calls its ``step`` and nothing else of it.
        params: its parameters, in the guard's order.
        takes_loss: whether its step takes the loss, as that of some learned optimizers does.
        switches: whether it trains at another iterate than the one that it evaluates.
        copies: names of entries of its state that hold the parameters, such as master weights.
        holder: the name of the lane whose memory it has.
        steps: whether it is stepped by its lane right now.
    """

    def __init__(self, optimizer: Optimizer, params: list[Tensor]) -> None:
        self.optimizer, self.params = optimizer, params
        self.takes_loss = "loss" in inspect.signature(optimizer.step).parameters
        self.switches = callable(getattr(optimizer, "train", None))
        # What schedule-free optimizers train at begins as a copy: seen in their first step alone.
        self.copies: set[str] = {"z"} if self.switches else set()
        self.looked = False
        """Whether it was seen which entries are copies."""
        self.holder = ""
        self.steps = False
        self._parked: dict[str, Memory] = {}
        """Those of its other lanes, by name."""
        self._fresh = self.memory("").copy()

    @contextmanager
    def stepping(self, part: float = 1.0) -> Iterator[None]:
        """While it is stepped, by a guard alone: its rates are a part of what they are."""
        groups = [g for g in self.optimizer.param_groups if g.get("lr") is not None]
        rates = [] if part == 1 else [copied_rate(group) for group in groups]
        self.steps = True
        try:
            set_rates(groups, [rate * part for rate in rates])
            yield
        finally:
            self.steps = False
            set_rates(groups, rates)

    def fresh(self, old: Memory | None = None) -> Memory:
        """As when the guard was built, by when some optimizers have made all that they remember.

        The clock of a learned optimizer is an ``old`` one's: it goes on from where it is.
        """
        memory = self._fresh.copy()
        for options, was in zip(memory.options, old.options if old else (), strict=False):
            if "clock" in options:
                options["clock"] = was["clock"]
        return memory

    def add(self, lane: str) -> None:
        """Have another lane, which remembers nothing; the first one is in the optimizer."""
        if self.holder:
            self._parked[lane] = self.fresh()
        else:
            self.holder = lane

    def hold(self, lane: str) -> None:
        """Have a lane's memory in the optimizer."""
        if lane in self._parked:
            self._parked[self.holder] = self.exchange(self._parked.pop(lane))
            self.holder = lane

    def remember(self, lane: str, memory: Memory) -> None:
        """Have a lane remember this."""
        if lane in self._parked:
            self._parked[lane] = memory
        else:
            self.exchange(memory)

    def memory(self, lane: str) -> Memory:
        """A lane's memory itself."""
        if lane in self._parked:
            return self._parked[lane]
        options = list(map(options_of, self.optimizer.param_groups))
        return Memory(dict(self.optimizer.state), options)

    def exchange(self, memory: Memory) -> Memory:
        """Put ``memory`` itself in place and return what was there; the schedule stays."""
        state, previous = self.optimizer.state, self.memory(self.holder)
        state.clear()
        state.update(memory.state)
        set_back(self.optimizer.param_groups, memory.options)
        return previous

    def is_finite(self, memory: Memory) -> bool:
        """Whether every number in a memory is finite, but for what was given, such as bounds."""
        groups = zip(memory.options, self._fresh.options, strict=False)
        made = [
            [one for key, one in now.items() if key not in SETTINGS and not same(one, was.get(key))]
            for now, was in groups
        ]
        return finite([*memory.state.values(), made])

    def find_copies(self, memory: Memory, start: list[Tensor], point: list[Tensor]) -> None:
        """Note which entries hold the parameters, after a step from ``start`` to ``point``.

        If the parameters haven't moved, as at a rate of 0, nothing is known yet.
        """
        steps = list(zip(self.params, start, point, strict=False))
        if all(torch.equal(before, now) for _, before, now in steps):
            return
        self.looked = True
        alike: dict[str, list[bool]] = {}
        for p, before, now in steps:
            for key, entry in self._tensors(memory, p):
                fits = entry.shape == now.shape and entry.layout is torch.strided
                if fits and now.numel() > 1 and before.any():
                    alike.setdefault(key, []).append(torch.equal(entry.to(now), now))
        self.copies |= {key for key, flags in alike.items() if all(flags)}

    def move_copies(self, memory: Memory, point: list[Tensor]) -> None:
        """Have these be the parameters at a point."""
        for p, value in zip(self.params, point, strict=False) if self.copies else ():
            for key, entry in self._tensors(memory, p):
                if key in self.copies and entry.shape == value.shape:
                    entry.copy_(value)

    def go_on(self, settings: list[dict[str, Any]], copies: set[str]) -> None:
        """Go on from a saved cycle: from settings of its groups, and with known copies."""
        self.copies = copies
        for group, saved in zip(self.optimizer.param_groups, settings, strict=False):
            group.update({key: value for key, value in saved.items() if key in SETTINGS})

    def _tensors(self, memory: Memory, p: Tensor) -> list[tuple[str, Tensor]]:
        """What is remembered of a parameter, as far as it is tensors."""
        entries = memory.state.get(p)
        if not isinstance(entries, dict):
            return []
        return [(key, local(one)) for key, one in entries.items() if isinstance(one, Tensor)]
