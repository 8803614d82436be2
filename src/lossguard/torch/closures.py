"""What a closure must return and do, and what a guard says of one that doesn't."""

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lossguard.torch.weights import Weights

Closure = Callable[[], Any]

SAME = 1e-2
"""The part of a loss by which rounding may change it."""


class Watch:
    """Looks for mistakes that would train nothing, or compare lanes wrongly, without an error.

    Attributes:
        weights: the live tensors.
        first: whether what no branch owns is still to be looked at, in the first call.
        warned: whether a warning of different losses was given, which happens once.
        told: whether one of errors was.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.first = True
        self.warned = False
        self.told = False

    def call(self, closure: Any) -> Any:
        """The value of a closure that trains; refuse one that leaves no gradients."""
        self.weights.clear_gradients()
        beside = self.first and self.weights.model is None
        buffers = _buffers_beside(self.weights.params) if beside else []
        before = [module[name].clone() for module, name in buffers]
        others = self.weights.others() if self.first else []
        versions = [p._version for p in others]
        value = closure()
        # A closure may leave the backward pass out where the loss isn't finite.
        if not self.weights.have_gradients() and math.isfinite(scalar(value)):
            raise ValueError("closure must call backward, got no gradients from it")
        if not all(_same(old, one[name]) for old, (one, name) in zip(before, buffers, strict=True)):
            raise ValueError(
                "model must be given where modules have buffers that training changes, such as "
                "BatchNorm's: got None"
            )
        if versions != [p._version for p in others]:
            raise ValueError(
                "parameters of model that no optimizer has must not change in the closure, as all "
                "lanes share them: give them to the optimizers, without gradients"
            )
        self.first = False
        return value

    def compare(self, losses: Sequence[float]) -> None:
        """Warn once if lanes have different losses on one minibatch at the same parameters."""
        low, high = min(losses, default=0.0), max(losses, default=0.0)
        if not self.warned and high - low > SAME * max(abs(low), abs(high)):
            self.warned = True
            warnings.warn(
                f"closure gave different losses at the same parameters ({high:.4g} and {low:.4g}): "
                "draw the minibatch, and all random numbers but PyTorch's, outside it",
                RuntimeWarning,
                stacklevel=2,
            )

    def tell(self, error: Exception, optimizer: Optimizer) -> None:
        """Warn once that a lane is left for an error."""
        if not self.told:
            self.told = True
            warnings.warn(
                f"learned ({type(optimizer).__name__}) has numbers that aren't finite and raised "
                f"{error!r}: it is left out of such cycles",
                RuntimeWarning,
                stacklevel=2,
            )


def checked(closure: Callable[[], Any] | None, hint: str = "") -> Callable[[], Any]:
    """The closure; refuse what isn't one. The ``hint`` is for those who gave none."""
    if not callable(closure):
        raise ValueError(
            "closure must be a function that returns the loss, got "
            f"{described(closure)}{hint if closure is None else ''}"
        )
    return closure


def scalar(loss: Any) -> Tensor:
    """The value of a closure as a detached tensor without dimensions."""
    if not isinstance(loss, (Tensor, Real)) or (isinstance(loss, Tensor) and loss.numel() != 1):
        raise ValueError(f"closure must return the loss, one number, got {described(loss)}")
    dtype = None if isinstance(loss, Tensor) else torch.float64
    return torch.as_tensor(loss, dtype=dtype).detach().reshape(())


def own(value: Any) -> Any:
    """A closure's value, of which nothing changes if the closure writes all to the same tensor."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def described(value: Any) -> str:
    """What an error message says that it got."""
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_scaled(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Refuse gradients that the lane's scaler hasn't scaled, or has unscaled for another lane's."""
    if not scaler.is_enabled():
        return
    others = scaler._per_optimizer_states.keys() - {id(optimizer)}
    if scaler._scale is None or others:
        raise ValueError(
            "closure must scale by guard.scaler.scale(loss) and unscale by guard.unscale_(), got "
            + ("gradients unscaled for another optimizer" if others else "gradients not so scaled")
        )


def _same(old: Tensor, new: Any) -> bool:
    if not isinstance(new, Tensor) or new.shape != old.shape:
        return False
    return bool(((new == old) | (new.isnan() & old.isnan())).all())


def _buffers_beside(params: Sequence[Tensor]) -> list[tuple[dict[str, Any], str]]:
    """Where every module that has one of the parameters itself holds its buffers, and their names.

    They are looked up among all objects, since a hook on modules would make torch.compile warn and
    compile anew. That is done once, in half a second where there are millions of them.
    """
    ours = {id(p) for p in params}
    modules = [vars(one) for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    return [
        (module["_buffers"], name)
        for module in modules
        if any(id(p) in ours for p in module.get("_parameters", {}).values())
        for name, buffer in module["_buffers"].items()
        if type(buffer) is Tensor and buffer.layout is torch.strided
    ]
