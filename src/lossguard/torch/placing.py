"""How a lane gets into the model, and what was there back afterwards: by value, or by pointer.

By value is the reference, and right for every parameter. By pointer copies nothing and needs no
copy of x (or s), which stays where it is while a lane's tensors stand in for it.
"""

from typing import Protocol

from torch import Tensor, nn

from lossguard.torch.weights import Copy, Weights


class Placing(Protocol):
    """Puts lanes into a model and takes them out."""

    def begin(self) -> None:
        """Note what the model holds."""

    def enter(self, copy: Copy) -> None:
        """Put a lane into the model."""

    def save(self, copy: Copy) -> None:
        """Note in its copy what has become of the lane in the model."""

    def leave(self) -> None:
        """Put back what it held."""


class ByValue:
    """Copies values in and out, so that tensors stay where they are."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.x = weights.copy()

    def begin(self) -> None:
        self.weights.copy_to(self.x)

    def enter(self, copy: Copy) -> None:
        self.weights.copy_from(copy)

    def save(self, copy: Copy) -> None:
        self.weights.copy_to(copy)

    def leave(self) -> None:
        self.weights.copy_from(self.x)


class ByPointer:
    """Lends every parameter the lane's tensor; buffers, which are small, go by value."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.homes: list[Tensor] = []
        self.buffers = weights.copy_buffers()

    def begin(self) -> None:
        self.weights.copy_buffers_to(self.buffers)

    def enter(self, copy: Copy) -> None:
        params = self.weights.params
        self.homes = self.homes or [p.data for p in params]
        for p, value in zip(params, copy, strict=False):
            p.data = value
        self.weights.copy_buffers_from(self.weights.buffers_of(copy))

    def save(self, copy: Copy) -> None:
        self.weights.copy_buffers_to(self.weights.buffers_of(copy))

    def leave(self) -> None:
        for p, home in zip(self.weights.params, self.homes, strict=False):
            p.data = home
        self.homes = []
        self.weights.copy_buffers_from(self.buffers)


def placing(weights: Weights) -> Placing:
    """By pointer if that is safe: every parameter is a plain tensor and has a storage to itself.

    Someone else may hold the storage that several share: cuDNN's flat weights, or FSDP's.
    """
    plain = weights.device is None and all(_is_plain(p) for p in weights.params)
    return ByPointer(weights) if plain and not weights.overlap() else ByValue(weights)


def _is_plain(p: Tensor) -> bool:
    return (
        type(p) in (Tensor, nn.Parameter)
        and type(p.data) is Tensor
        and p.untyped_storage().nbytes() == p.numel() * p.element_size()
    )
