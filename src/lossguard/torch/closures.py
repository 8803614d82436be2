"""What a closure must return, how its loss alone is had, and what it may do wrong in silence."""

import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lossguard.torch.tensors import read

Closure = Callable[[], Any]
T = TypeVar("T")

SAME = 1e-4
"""The part of a loss by which rounding may change it."""
NOTE = (
    "lossguard: the guard only checks here (guard.checking is true), so the closure runs without "
    "gradients: leave out what reads p.grad, and put `with torch.enable_grad():` inside it around "
    "what torch.autograd.grad or retain_grad needs"
)


def checked(closure: Any, hint: str = "") -> Closure:
    """The closure; refuse what isn't one. The ``hint`` is for those who gave none."""
    if callable(closure):
        return closure
    got = f"{_described(closure)}{hint if closure is None else ''}"
    raise ValueError(f"closure must be a function that returns the loss, got {got}")


def scalar(loss: Any) -> Tensor:
    """A loss as a tensor without dimensions, which stays if the loss is overwritten."""
    if not isinstance(loss, (Tensor, Real)) or (isinstance(loss, Tensor) and loss.numel() != 1):
        raise ValueError(f"closure must return the loss, one number, got {_described(loss)}")
    if isinstance(loss, Tensor):
        return loss.detach().clone().reshape(())
    return torch.as_tensor(loss, dtype=torch.float64).reshape(())


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


class _NoBackward(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is Tensor.backward else func(*args, **(kwargs or {}))


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


def compare(losses: Sequence[Tensor]) -> None:
    """Warn if lanes that were at one point had different losses on the first minibatch there."""
    numbers = read(losses)
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    if high - low > SAME * max(abs(low), abs(high)):
        warnings.warn(
            f"closure gave different losses at the same parameters ({high:.4g} and {low:.4g}): "
            "draw the minibatch, and all random numbers but PyTorch's, outside it",
            RuntimeWarning,
            stacklevel=2,
        )


def tell(error: Exception, lane: object) -> None:
    """Warn that a lane's minibatch is lost to an error."""
    warnings.warn(
        f"{lane} has numbers that aren't finite and raised {type(error).__name__}: such "
        "minibatches count as lost for it",
        RuntimeWarning,
        stacklevel=2,
    )
