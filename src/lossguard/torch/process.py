"""What belongs to no lane: random numbers, and modes of training."""

from collections.abc import Iterable, Iterator
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
