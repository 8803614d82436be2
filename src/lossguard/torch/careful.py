"""What happens around each step of an optimizer: a lower rate, and no gradient that isn't finite.

Two hooks of the optimizer do it. Between steps the rates are those that the user and the schedulers
set, so that schedulers of every kind go on from their own numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.rates import set_rate
from lossguard.torch.tensors import zero_unsound

SOUND = torch.tensor(False)


class CarefulSteps:
    """Hooks that multiply the rates by ``scale()`` during a step, and zero unsound gradients.

    Attributes:
        broken: whether the last step's gradients weren't finite, as a tensor on their device.
    """

    def __init__(self, optimizer: Optimizer, scale: Callable[[], float]) -> None:
        self.broken = SOUND
        self._scale = scale
        self._rates: list[float | Tensor] | None = None
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._after(optimizer)  # if the last step raised an error half-way
        self.broken = zero_unsound(p for group in optimizer.param_groups for p in group["params"])
        scale = self._scale()
        if scale != 1:
            rates = [group["lr"] for group in optimizer.param_groups]
            self._rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                set_rate(group, rate * scale)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if self._rates is not None:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                set_rate(group, rate)
            self._rates = None
