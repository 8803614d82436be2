"""The random numbers of a minibatch: the same in every lane."""

from collections.abc import Iterable
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
