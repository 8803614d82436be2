"""Tensors in nested containers: copies of them, and their numbers."""

import copy
import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def clone(value: Any) -> Any:
    """A copy of nested containers, of their own types, and of every tensor in them.

    What is there twice is there twice in the copy: optimizers may share a step counter.
    """
    copies: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, (int, float, str, bool, type(None))):
            return value
        if id(value) not in copies:
            copies[id(value)] = made(value)
        return copies[id(value)]

    def made(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            new = copy.copy(value)
            for key, item in value.items():
                new[key] = copied(item)
            return new
        if type(value) in (list, tuple):
            return type(value)(copied(item) for item in value)
        return copy.deepcopy(value)

    return copied(value)


def finite(value: Any) -> bool:
    """Whether every number in nested containers is finite.

    Finite sums prove it, in one pass over each tensor and a single read from the device; only where
    one isn't are the tensors looked at closely, since finite numbers can overflow in a sum.
    """
    leaves = list(_leaves(value))
    tensors = [
        stored(leaf)
        for leaf in leaves
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]
    sums = read([_summable(tensor).sum().abs() for tensor in tensors])
    return all(math.isfinite(leaf) for leaf in leaves if isinstance(leaf, float)) and (
        all(map(math.isfinite, sums))
        or all(bool(_summable(tensor).isfinite().all()) for tensor in tensors)
    )


def read(scalars: Sequence[Tensor]) -> list[float]:
    """Real numbers, all at once, as each read waits for the device."""
    if not scalars:
        return []
    device = scalars[-1].device  # a model may lie on several, and losses be loaded to another one
    widest = reduce(torch.promote_types, {scalar.dtype for scalar in scalars}, torch.float32)
    return torch.stack([scalar.to(device, widest) for scalar in scalars]).tolist()


def stored(tensor: Tensor) -> Tensor:
    """The numbers that a tensor has on this rank; of a sparse one those that it stores."""
    tensor = local(tensor)
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a distributed tensor, or the tensor itself."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # pyright: ignore


def _summable(tensor: Tensor) -> Tensor:
    """The same numbers in a dtype that can be summed, which those of 8 bits can't."""
    return tensor.bfloat16() if tensor.element_size() == 1 else tensor


def _leaves(value: Any) -> Iterator[Any]:
    """What nested containers hold."""
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value
