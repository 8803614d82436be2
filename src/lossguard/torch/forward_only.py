"""Runs an ordinary closure for its loss alone."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

NOTE = (
    "lossguard: the guard only checks here (guard.checking is true), so the closure runs without "
    "gradients: leave out what reads p.grad, and put `with torch.enable_grad():` inside it around "
    "what torch.autograd.grad or retain_grad needs"
)


class _NoBackward(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.backward:
            return None
        return func(*args, **(kwargs or {}))


def forward_only(closure: Callable[[], T]) -> T:
    """The value of ``closure``, whose calls of ``backward`` do nothing.

    >>> weight = torch.ones(3, requires_grad=True)
    >>> def closure():
    ...     loss = weight.sum()
    ...     loss.backward()
    ...     return loss
    >>> forward_only(closure), weight.grad
    (tensor(3.), None)
    """
    with torch.no_grad(), _NoBackward():
        try:
            return closure()
        except Exception as error:
            if not isinstance(error, StopIteration):  # the closure's own stream has ended
                error.add_note(NOTE)
            raise
