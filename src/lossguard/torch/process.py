"""What belongs to no lane: random numbers, modes of training, Ctrl-C and SIGTERM."""

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Randomness:
    """The generators that a forward pass may draw from: the CPU's, and of each device of params."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        devices: set[torch.device] = set()
        for p in params:  # shards on the host are gathered on their mesh's devices
            kind = getattr(getattr(p, "device_mesh", None), "device_type", p.device.type)
            devices.add(p.device if kind == p.device.type else torch.device(kind))
        self.generators: list[tuple[Any, list[Any]]] = [(torch, [])]
        for device in sorted((d for d in devices if d.type in ("cuda", "xpu", "mps")), key=str):
            which = [] if device.type == "mps" else [device]
            self.generators.append((torch.get_device_module(device), which))

    def state(self) -> list[Tensor]:
        return [module.get_rng_state(*which) for module, which in self.generators]

    def set(self, states: list[Tensor]) -> None:
        for (module, which), state in zip(self.generators, states, strict=True):
            module.set_rng_state(state, *which)


@contextmanager
def modes_kept(model: nn.Module | None) -> Iterator[None]:
    """A block after which each module is in the mode, of training or not, that it had before."""
    modes = {} if model is None else {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def held() -> Iterator[None]:
    """A block that Ctrl-C and SIGTERM wait for: what they raise comes at its end, a second at once.

    In threads other than the main one, which get no signals, it does nothing.
    """
    with _held(signal.SIGINT), _held(signal.SIGTERM):
        yield


class _Holder:
    """The handler of a signal that some blocks hold, which may end in any order."""

    def __init__(self, one: signal.Signals, before: Callable[..., Any]) -> None:
        self.one, self.before = one, before
        self.blocks = self.came = 0

    def __call__(self, *_: object) -> None:
        self.came += 1
        if self.came > 1:
            self.came = 0  # if this raises, that was it
            self.before(self.one, None)
            self.came = 1


@contextmanager
def _held(one: signal.Signals) -> Iterator[None]:
    holder = signal.getsignal(one)
    if threading.current_thread() is not threading.main_thread() or not callable(holder):
        yield
        return
    if not isinstance(holder, _Holder):
        holder = _Holder(one, holder)
    holder.blocks += 1
    try:  # another signal may come as soon as this one is held
        signal.signal(one, holder)
        yield
    finally:
        holder.blocks -= 1
        if holder.blocks == 0:
            signal.signal(one, holder.before)
            if holder.came and isinstance(sys.exception(), GeneratorExit):
                # What is raised in a generator that is being closed goes nowhere.
                threading.Timer(0.05, _thread.interrupt_main, (one,)).start()
            elif holder.came:
                holder.before(one, None)
