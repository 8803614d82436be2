"""Optimizers that wrap optimizers: what they show of the one inside."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.closures import Closure, checked


class Facade(Optimizer):
    """An optimizer whose parameter groups, state and defaults are those of another one.

    The other one's may be replaced at any time (``load_state_dict`` does), so they are looked up
    whenever they are asked for. A learning-rate scheduler on the facade drives the one inside.
    """

    _inside: Optimizer

    def __init__(self, inside: Optimizer) -> None:
        # Optimizer's own constructor would make new groups; this is how one is unpickled.
        self.__setstate__({"_inside": inside})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore
        return self._inside.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore
        return self._inside.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore
        return self._inside.defaults

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks and the ``step`` that a scheduler has wrapped, as in torch.optim."""
        return {
            key: value
            for key, value in self.__dict__.items()
            if not key.startswith("_optimizer_") and key not in ("step", "_opt_called")
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._inside.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self._inside.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inside.load_state_dict(state_dict)


class LossStep(Facade):
    """Lets an optimizer that wants ``step(loss)`` be stepped with a closure.

        loss = closure();  optimizer.step(loss)

    Learned optimizers that read the loss have this convention. The closure has called ``backward``
    by then, so the gradients are there too.

    Args:
        optimizer: a ``torch.optim.Optimizer`` whose ``step`` takes the loss.

    >>> import torch
    >>> class Polyak(torch.optim.SGD):
    ...     def step(self, loss):
    ...         square = sum(p.grad.square().sum() for p in self.param_groups[0]["params"])
    ...         self.param_groups[0]["lr"] = (loss / square).item()
    ...         super().step()
    >>> w = torch.tensor([3.0], requires_grad=True)
    >>> optimizer = LossStep(Polyak([w]))
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item(), w.item()
    (9.0, 1.5)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)

    def step(self, closure: Closure | None = None) -> Tensor:  # pyright: ignore
        loss = checked(closure)()
        step: Callable[[Any], object] = self._inside.step
        step(loss)
        return loss
