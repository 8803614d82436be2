"""Gradients before a step: those far out of line are left out, and some are clipped."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lossguard.torch.tensors import PLAIN, Number, is_sharded, local

REMEMBERED = 128
FIRST = 32
"""Norms that are heard before one can be out of line."""
DEVIATIONS = 8.0
"""Above the median of logarithms; those of healthy runs have heavy tails."""
TIMES = 8.0
"""The norm is so many times the median at least, however even the norms are."""
SPARE, PART = 8, 0.01
"""Steps that are left out for their norm are no more than these and this part of all."""


class Gate:
    """From which norm on the gradients of an optimizer are out of line.

    Of the last 128 norms, in logarithms: the median and the larger of 8 robust deviations and log
    8 above it. There is no limit among the first, and while 8 + 1 % of the steps were left out.

    >>> gate = Gate()
    >>> gate.hear([1.0, 1.1] * 16)
    >>> 8 < gate.limit < 9, gate.usual
    (True, 1.0488...)
    """

    def __init__(self) -> None:
        self.heard = self.left = 0
        self.limit = self.usual = math.inf
        self._logs: deque[float] = deque(maxlen=REMEMBERED)

    def hear(self, norms: Sequence[float]) -> None:
        """Of steps since the last time, of which those above ``limit`` were left out."""
        norms = [norm for norm in norms if 0 < norm < math.inf]
        self.heard += len(norms)
        self.left += sum(norm > self.limit for norm in norms)
        self._logs.extend(map(math.log, norms))
        if self.heard < FIRST:
            return
        middle = statistics.median(self._logs)
        deviation = 1.4826 * statistics.median(abs(one - middle) for one in self._logs)
        above = max(DEVIATIONS * deviation, math.log(TIMES))
        self.usual = math.exp(middle)
        spent = self.left >= SPARE + PART * self.heard
        self.limit = math.inf if spent else math.exp(min(middle + above, 700.0))

    def numbers(self) -> dict[str, Any]:
        return {**vars(self), "_logs": list(self._logs)}

    def load(self, numbers: dict[str, Any]) -> None:
        found = {name: numbers[name] for name in vars(self)}
        vars(self).update({**found, "_logs": deque(found["_logs"], maxlen=REMEMBERED)})


@torch.no_grad()
def gated(params: Iterable[Tensor], limit: float, clip: float) -> tuple[Number, Number]:
    """Make all gradients 0 whose norm isn't at most ``limit`` or isn't finite; scale others down to
    a norm of ``clip``. Returns the norm before and whether they were made 0: nothing waits.

    The norm is that of all shards.
    """
    params = list(params)
    grads: list[Any] = [p.grad for p in params if p.grad is not None]
    parts = [grad._values() if grad.is_sparse else local(grad) for grad in grads]
    norm = _norm(parts, params)
    if norm.is_cpu:  # elsewhere to look would be to wait
        size = norm.item()
        if not (size <= limit and size < math.inf):
            for part in parts:
                part.zero_()
            return size, True
        if size > clip:
            torch._foreach_mul_(parts, clip / size)  # pyright: ignore
        return size, False
    left = ~((norm <= limit) & norm.isfinite())
    for part in parts:
        part.masked_fill_(left.to(part.device), 0)
        if clip < math.inf:
            part.mul_((clip / norm).clamp(max=1.0).nan_to_num(0.0).to(part.device))
    return norm, left


def _norm(parts: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    dense = [part for part in parts if part.numel()]
    if not dense:
        norm = torch.zeros((), device="cpu")
    elif len(dense) == 1:
        norm = _wide(torch.linalg.vector_norm(dense[0]))
    else:
        norms: Any = torch._foreach_norm(list(map(_wide, dense)))  # pyright: ignore
        norms = [one.to(norms[0]) for one in norms]
        norm = torch.linalg.vector_norm(torch.stack(norms))
    if {*map(type, params)} <= PLAIN:
        return norm
    # By the parameters: a rank may have no gradient, and has to join all the same.
    meshes = {p.device_mesh: None for p in params if is_sharded(p)}  # pyright: ignore
    for mesh in meshes:
        from torch.distributed.tensor import DTensor, Partial

        of_all = [Partial("sum")] * mesh.ndim
        norm = DTensor.from_local(norm.square(), mesh, of_all).full_tensor().sqrt()
    return norm


def _wide(part: Tensor) -> Tensor:
    """In a dtype in which squares of gradients have room."""
    return part.float() if part.dtype == torch.float16 or part.element_size() == 1 else part
