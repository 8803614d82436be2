"""What happens around each step of an optimizer: a lower rate, and no gradient that isn't finite.

Two hooks of the optimizer do it. Between steps the rates are those that the user and the schedulers
set, so that schedulers of every kind go on from their own numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.snapshot import set_rate
from lossguard.torch.tensors import are_finite, local


class CarefulSteps:
    """Hooks that multiply the rates by ``scale()`` during a step, and zero unsound gradients.

    Attributes:
        broken: whether gradients of a step since ``forget`` weren't finite: a tensor on their
            device, or None if there was no step.
    """

    def __init__(self, optimizer: Optimizer, scale: Callable[[], float]) -> None:
        self.broken: Tensor | None = None
        self._scale, self._optimizer = scale, optimizer
        self._rates: list[float | Tensor] | None = None
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def forget(self) -> None:
        """Begin another step."""
        self.broken = None

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._after(optimizer)  # if the last step raised an error half-way
        self._zero_unsound()
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

    @torch.no_grad()
    def _zero_unsound(self) -> None:
        """Make all gradients 0 if one of them isn't finite; the host doesn't wait for a device."""
        params = (param for group in self._optimizer.param_groups for param in group["params"])
        grads = [local(p.grad) for p in params if p.grad is not None and not p.grad.is_sparse]
        if grads:
            broken = ~are_finite(grads)
            self.broken = broken if self.broken is None else self.broken | broken
            if broken.device.type == "cpu" and not broken:  # elsewhere the host would have to wait
                return
            for grad in grads:
                grad.masked_fill_(broken.to(grad.device), 0)
