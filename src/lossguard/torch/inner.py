"""What an inner optimizer remembers of its own steps, told apart from its schedule.

state    the optimizer's ``state``: momentum, moments, step counters, LSTM cells
own      entries of a parameter group that the optimizer's own step replaces (schedule-free's ``k``)
shared   every other entry of a group (lr, betas, ...): the schedule. It is set from outside, so it
         is never rolled back and every lane of the same optimizer sees the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
        fresh: a copy of its memory at construction.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.own: set[str] = set()
        self.fresh = self.remember()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Note which group entries the optimizer's step inside changes."""
        before = self._options()
        yield
        for old, new in zip(before, self._options(), strict=True):
            self.own |= {key for key in new if not _same(old.get(key), new[key])}

    def remember(self) -> Memory:
        """A copy of the memory."""
        return Memory(dict(self.optimizer.state), self._options()).copy()

    def restore(self, memory: Memory) -> None:
        """Put a copy of ``memory`` back; the schedule stays as it is."""
        self.exchange(memory.copy())

    def exchange(self, memory: Memory) -> Memory:
        """Put ``memory`` itself in place and return what was there; the schedule stays."""
        state = self.optimizer.state
        previous = Memory(dict(state), self._options())
        state.clear()
        state.update(memory.state)
        for group, options in zip(self.optimizer.param_groups, memory.options, strict=False):
            for key in self.own:
                if key in options:
                    group[key] = options[key]
                else:
                    group.pop(key, None)  # a step makes it
        return previous

    @contextmanager
    def remembering(self, memory: Memory) -> Iterator[None]:
        """Have ``memory`` in place inside, and what was there again afterwards."""
        current = self.exchange(memory)
        try:
            yield
        finally:
            self.exchange(current)

    def schedule(self) -> list[dict[str, Any]]:
        """The entries of each group that are set from outside."""
        return [
            {key: clone(value) for key, value in options.items() if key not in self.own}
            for options in self._options()
        ]

    def follow(self, schedule: list[dict[str, Any]]) -> None:
        """Put a schedule in place; the memory stays as it is."""
        for group, options in zip(self.optimizer.param_groups, schedule, strict=True):
            for key in options.keys() - self.own:
                if isinstance(group[key], Tensor):  # the optimizer may hold on to it
                    group[key].copy_(options[key])
                else:
                    group[key] = options[key]

    def is_finite(self, memory: Memory | None = None) -> bool:
        """Whether every number in a memory (its own, if none is given) is finite."""
        memory = Memory(self.optimizer.state, self._options()) if memory is None else memory
        own = [[options.get(key) for key in self.own] for options in memory.options]
        return finite([*memory.state.values(), own])

    def renew(self) -> bool:
        """Reset the memory if it isn't finite; whether that was so."""
        broken = not self.is_finite()
        if broken:
            self.restore(self.fresh)
        return broken

    def grow(self) -> None:
        """Make room for the parameter group that the optimizer has just got."""
        self.fresh.options.append(clone(self._options()[-1]))

    def state_dict(self, memory: Memory | None = None) -> dict[str, Any]:
        """A copy of the optimizer's ``state_dict``, with ``memory`` in place if one is given."""
        if memory is None:
            return clone(self.optimizer.state_dict())
        with self.remembering(memory):
            return clone(self.optimizer.state_dict())

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load a copy of ``saved``, every tensor in the dtype in which it was saved.

        ``Optimizer.load_state_dict`` casts floating state to the parameter's dtype, which would
        round the float32 moments of a bfloat16 parameter, and makes of a string another one.
        """
        saved = clone(saved)
        self.optimizer.load_state_dict(saved)
        undo_casts(self.optimizer, saved)

    def memory_in(self, saved: dict[str, Any]) -> Memory:
        """What ``state_dict`` saved of a memory, read by way of the optimizer."""
        current = self.remember()
        self.load_state_dict(saved)
        memory = self.remember()
        self.exchange(current)
        return memory

    def _options(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in group.items() if key not in IDENTITY}
            for group in self.optimizer.param_groups
        ]


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def undo_casts(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer that has just loaded ``saved`` every tensor in the dtype it has there."""
    params = params_of(optimizer)
    for index, state in saved["state"].items():
        if isinstance(index, int) and params[index] in optimizer.state:
            loaded = optimizer.state[params[index]]
            optimizer.state[params[index]] = _uncast(state, loaded)


def _same(old: Any, new: Any) -> bool:
    comparable = (int, float, str, tuple, type(None))  # not what holds tensors
    return old is new or (
        isinstance(old, comparable) and isinstance(new, comparable) and old == new
    )


def _uncast(saved: Any, loaded: Any) -> Any:
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _uncast(saved.get(key), value) for key, value in loaded.items()}
    if type(saved) in (list, tuple) and type(loaded) is type(saved) and len(saved) == len(loaded):
        return type(saved)(_uncast(*pair) for pair in zip(saved, loaded, strict=True))
    return saved if isinstance(saved, str) else loaded
