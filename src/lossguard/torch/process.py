"""What belongs to the process and to no lane: its random numbers, Ctrl-C and SIGTERM."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Randomness:
    """The generators that a forward pass may draw from: the CPU's, and of each device of params."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        devices = {p.device for p in params if p.device.type in ("cuda", "xpu", "mps")}
        self.generators: list[tuple[Any, list[Any]]] = [(torch, [])]
        for device in sorted(devices, key=str):
            which = [] if device.type == "mps" else [device]
            self.generators.append((torch.get_device_module(device), which))

    def state(self) -> list[Tensor]:
        """The state of every generator."""
        return [module.get_rng_state(*which) for module, which in self.generators]

    def set(self, states: list[Tensor]) -> None:
        """Put every generator back to a state that ``state`` returned."""
        for (module, which), state in zip(self.generators, states, strict=True):
            module.set_rng_state(state, *which)


@contextmanager
def held() -> Iterator[None]:
    """A block that Ctrl-C and SIGTERM wait for: what they raise comes at its end, a second at once.

    In threads other than the main one, which get no signals, it does nothing.
    """
    with _held(signal.SIGINT), _held(signal.SIGTERM):
        yield


@contextmanager
def _held(one: signal.Signals) -> Iterator[None]:
    before, came = signal.getsignal(one), 0
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def note(*which: object) -> None:
        nonlocal came
        came += 1
        if came > 1:
            came = 0  # if this raises, that was it
            before(one, None)
            came = 1

    try:  # another signal may come as soon as this one is held
        signal.signal(one, note)
        yield
    finally:
        signal.signal(one, before)
        if came:
            before(one, None)
