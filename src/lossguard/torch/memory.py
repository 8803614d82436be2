"""What an optimizer remembers of its own steps, told apart from its schedule.

state    the optimizer's ``state``: momentum, moments, step counters, LSTM cells
own      entries of a parameter group that the optimizer's own step replaces (schedule-free's ``k``)
shared   every other entry of a group (lr, betas, ...): the schedule. It is set from outside, so
         every lane of the same optimizer sees the same.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.rates import options_of, same
from lossguard.torch.tensors import finite, leaves, local

MEMORY = ("state", "param_groups")
"""Attributes of an optimizer of which each lane has its own."""


class Memory(NamedTuple):
    """What an optimizer remembers.

    Attributes:
        state: the optimizer's ``state``, by parameter.
        options: the entries of each parameter group, without its parameters.
    """

    state: dict[Any, Any]
    options: list[dict[str, Any]]

    def copy(self) -> "Memory":
        """A memory that shares nothing with this one."""
        kept = {id(p): p for p in self.state}
        return copy.deepcopy(self, kept)


class Inner:
    """An optimizer whose memory can be copied, put back and exchanged.

    Attributes:
        optimizer: the optimizer itself; the guard calls its ``step`` and nothing else of it.
        takes_loss: whether its step takes the loss, as that of some learned optimizers does.
        own: names of the group entries that its step has been seen to change.
        copies: names of entries of its state that hold the parameters, as master weights do.
        holder: the lane whose memory it has; another lane of it keeps its own meanwhile.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.takes_loss = "loss" in inspect.signature(optimizer.step).parameters
        self.own: set[str] = set()
        self.copies: set[str] = set()
        self.holder: Any = None
        self._fresh = self.memory().copy()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Note which group entries the optimizer's step inside changes."""
        before = self.options()
        yield
        for old, new in zip(before, self.options(), strict=True):
            self.own |= {key for key in new if not same(old.get(key), new[key])}

    def fresh(self) -> Memory:
        """As when the guard was built, by when some optimizers have made all that they remember."""
        return self._fresh.copy()

    def memory(self) -> Memory:
        """The memory itself."""
        return Memory(dict(self.optimizer.state), self.options())

    def exchange(self, memory: Memory) -> Memory:
        """Put ``memory`` itself in place and return what was there; the schedule stays."""
        state, previous = self.optimizer.state, self.memory()
        state.clear()
        state.update(memory.state)
        for group, options in zip(self.optimizer.param_groups, memory.options, strict=True):
            for key in self.own:
                if key in options:
                    group[key] = options[key]
                else:
                    group.pop(key, None)  # a step makes it
        return previous

    def is_finite(self, memory: Memory) -> bool:
        """Whether every number in a memory is finite."""
        own = [[options.get(key) for key in self.own] for options in memory.options]
        return finite([*memory.state.values(), own])

    def note_copies(self, memory: Memory, values: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Note which entries of a memory hold the parameters, whose values these are.

        Raises:
            ValueError: if other attributes of the optimizer hold some, where no lane can have them.
        """
        attributes = {k: v for k, v in vars(self.optimizer).items() if k not in MEMORY}
        tensors = [local(leaf) for leaf in leaves(attributes) if isinstance(leaf, Tensor)]
        params = {
            local(p).data_ptr() for group in self.optimizer.param_groups for p in group["params"]
        }
        hidden = [t for t in tensors if t.layout is torch.strided and t.data_ptr() not in params]
        alike: dict[str, list[bool]] = {}
        for p, value in values:
            if any(_is_copy(tensor, value) for tensor in hidden):
                raise ValueError(
                    "optimizers must keep copies of parameters in their state, got "
                    f"{type(self.optimizer).__name__} with some in an attribute, by which it would "
                    "undo what the guard writes"
                )
            for key, entry in _tensors(memory, p).items():
                if entry.shape == value.shape and entry.numel() > 1:
                    alike.setdefault(key, []).append(_is_copy(entry, value))
        self.copies |= {key for key, flags in alike.items() if all(flags)}

    def move_copies(self, memory: Memory, values: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Have those in a memory be these values."""
        for p, value in values if self.copies else ():
            entries = _tensors(memory, p)
            for key in self.copies & entries.keys():
                entries[key].copy_(value)

    def options(self) -> list[dict[str, Any]]:
        """The entries of each group, without its parameters."""
        return [options_of(group) for group in self.optimizer.param_groups]


def _tensors(memory: Memory, p: Tensor) -> dict[str, Tensor]:
    """What it holds of a parameter, as far as these are tensors."""
    entries = memory.state.get(p)
    named = entries.items() if isinstance(entries, dict) else ()
    return {key: local(entry) for key, entry in named if isinstance(entry, Tensor)}


def _is_copy(tensor: Tensor, value: Tensor) -> bool:
    return (
        tensor.shape == value.shape and tensor.numel() > 1 and torch.equal(tensor.to(value), value)
    )
