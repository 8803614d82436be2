"""What an optimizer remembers of its own steps, told apart from its schedule.

state    the optimizer's ``state``: momentum, moments, step counters, LSTM cells
own      entries of a parameter group that the optimizer's own step replaces (schedule-free's ``k``)
shared   every other entry of a group (lr, betas, ...): the schedule. It is set from outside, so
         every lane of the same optimizer sees the same.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.tensors import clone, finite

IDENTITY = ("params", "param_names")


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
        return Memory(clone(self.state), clone(self.options))


class Inner:
    """An optimizer whose memory can be copied, put back and exchanged.

    Attributes:
        optimizer: the optimizer itself; the guard calls its ``step`` and nothing else of it.
        own: names of the group entries that its step has been seen to change.
        takes_loss: whether its step takes the loss, as that of some learned optimizers does.
        copies: names of entries of its state that hold the parameters, as master weights do.
        fresh: a copy of its memory at construction.
        holder: the lane whose memory it has; another lane of it keeps its own meanwhile.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.takes_loss = "loss" in inspect.signature(optimizer.step).parameters
        self.own: set[str] = set()
        self.copies: set[str] = set()
        self.fresh = self.memory().copy()
        self.holder: Any = None
        self._made: dict[Any, Any] = {}

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Note which group entries the optimizer's step inside changes."""
        before = self.options()
        yield
        for old, new in zip(before, self.options(), strict=True):
            self.own |= {key for key in new if not same(old.get(key), new[key])}

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

    def note(self, memory: Memory) -> None:
        """Note what the optimizer makes for each parameter, if this is what it has made."""
        if memory.state:
            self._made = {
                p: {k: (v.shape, v.dtype) if isinstance(v, Tensor) else v for k, v in made.items()}
                for p, made in memory.state.items()
                if isinstance(p, Tensor) and isinstance(made, dict)
            }

    def zeros(self) -> dict[Any, Any]:
        """Tensors of 0 in place of what it makes: PyTorch loads only what both sides have."""
        return {
            p: {k: _zeros(p, *v) if type(v) is tuple else clone(v) for k, v in made.items()}
            for p, made in self._made.items()
        }

    def is_finite(self, memory: Memory) -> bool:
        """Whether every number in a memory is finite."""
        own = [[options.get(key) for key in self.own] for options in memory.options]
        return finite([*memory.state.values(), own])

    @property
    def is_capturable(self) -> bool:
        """Whether it keeps its counts on the device."""
        groups = self.optimizer.param_groups
        return any(group.get("capturable") or group.get("fused") for group in groups)

    def options(self) -> list[dict[str, Any]]:
        """The entries of each group, without its parameters."""
        return [options_of(group) for group in self.optimizer.param_groups]


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """The entries of a parameter group, without its parameters."""
    return {key: value for key, value in group.items() if key not in IDENTITY}


def _zeros(p: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Sharded as the parameter is, where it is of its shape."""
    if shape != p.shape:
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros_like(p.detach(), dtype=dtype)


def same(old: Any, new: Any) -> bool:
    """Whether a group entry is as it was; what holds tensors only if it is the same object."""
    plain = (int, float, str, tuple, type(None))
    return old is new or (isinstance(old, plain) and isinstance(new, plain) and old == new)


def undo_casts(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer that has just loaded ``saved`` every tensor in the dtype it has there.

    ``Optimizer.load_state_dict`` casts floating state to the parameter's dtype, which would round
    the float32 memory of a bfloat16 parameter.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["state"].items():
        if isinstance(index, int) and params[index] in optimizer.state:
            device = params[index].device
            optimizer.state[params[index]] = {
                key: value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }
