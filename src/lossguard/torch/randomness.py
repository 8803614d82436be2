"""The random numbers of a minibatch: the same in every lane."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Randomness:
    """The generators that a forward pass may draw from: the CPU's, and of each device of params."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        devices = {p.device for p in params}
        self.devices = sorted((d for d in devices if d.type in ("cuda", "xpu", "mps")), key=str)

    def state(self) -> list[Tensor]:
        """The state of every generator."""
        states = [torch.get_rng_state()]
        for device in self.devices:
            module = torch.get_device_module(device)
            states.append(
                module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
            )
        return states

    def set(self, states: list[Tensor]) -> None:
        """Put every generator back to a state that ``state`` returned."""
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            module = torch.get_device_module(device)
            if device.type == "mps":
                module.set_rng_state(state)
            else:
                module.set_rng_state(state, device)
