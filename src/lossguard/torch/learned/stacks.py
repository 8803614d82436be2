"""Parameters of any shape as the stacks of matrices that the arithmetic works on."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lossguard.learned.mlp_features import SCALE, UNITS, factored_axes, size_features
from lossguard.torch.learned.update import Block, Memory, Sums, advance, blocks_of, remember, scales

STACKED = 65_536
"""Coordinates that are copied into one stack: beyond it copies cost more than calls."""


def new_memory(p: Tensor) -> dict[str, Tensor]:
    """What is remembered of a parameter: zeros, which lie in memory as the arithmetic sees them."""
    shape = tuple(p.shape)
    axes = factored_axes(shape)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.float32, device=p.device)

    def shape_without(axis: int) -> list[int]:
        return [1 if k == axis else size for k, size in enumerate(shape)]

    order = _order(shape)
    back = [order.index(k) for k in range(len(order))]
    laid = [shape[k] for k in order]
    memory = {
        "momenta": zeros(3, *laid).permute(0, *(k + 1 for k in back)),
        "second_moment": zeros(*laid).permute(back),
    }
    if axes is None:
        memory["rows"] = zeros(3, *shape)
    else:
        shorter, longer = axes
        memory["rows"] = zeros(3, *shape_without(longer))
        memory["columns"] = zeros(3, *shape_without(shorter))
    memory["units"] = zeros(UNITS)
    return memory


class Stack(NamedTuple):
    """Some parameters of one shape, and what is remembered of them."""

    of: list[int]
    """Which they are."""
    views: dict[str, list[Tensor]]
    """Into the parameters (p) and the memory, each with its axes in order."""
    copies: dict[str, Tensor]
    """The same stacked, where one tensor isn't its own stack."""
    blocks: list[Block]
    memory: Memory


def move(
    params: list[Tensor],
    states: list[dict[str, Tensor]],
    weights: dict[str, Tensor],
    layers: int,
    lr: float | Tensor,
    t: int,
) -> None:
    """Move the parameters of one device, and what is remembered of them; t steps are behind."""
    device = params[0].device
    time = torch.full((), t, dtype=torch.float32, device=device)
    stacks = [_stack(of, params, states) for of in _stacks(params)]
    sums = [remember(weights, stack.blocks, stack.memory) for stack in stacks]
    order = [k for stack in stacks for k in stack.of]
    units = torch.stack([states[k]["units"] for k in order])
    sizes = torch.stack([_sizes(weights, params[k]) for k in order])
    all_sums = Sums(*(torch.cat(parts) for parts in zip(*sums, strict=True)))
    of_all = scales(weights, units, all_sums, sizes, time)
    torch._foreach_copy_([states[k]["units"] for k in order], list(units))  # pyright: ignore
    steps = (of_all * SCALE * lr).split([len(stack.of) for stack in stacks])
    for stack, some in zip(stacks, steps, strict=True):
        advance(weights, layers, stack.blocks, stack.memory, some, time)
        for name, copy in stack.copies.items():
            torch._foreach_copy_(stack.views[name], list(copy))  # pyright: ignore


def _stack(of: list[int], params: list[Tensor], states: list[dict[str, Tensor]]) -> Stack:
    some, memories = [params[k] for k in of], [states[k] for k in of]
    axes = some[0].dim()
    order = _order(tuple(some[0].shape))
    views = {"p": [p.detach().permute(order) for p in some]}
    for name in memories[0]:
        if name != "units":
            lead = memories[0][name].dim() - axes
            behind = [*range(lead), *(lead + k for k in order)]
            views[name] = [one[name].permute(behind) for one in memories]
    whole = {name: _stacked(tensors) for name, tensors in views.items()}
    copies = {
        name: one for name, one in whole.items() if one.data_ptr() != views[name][0].data_ptr()
    }
    g = _stacked([p.grad.permute(order) for p in some if p.grad is not None])
    p, *parts = (_matrices(one, axes) for one in whole.values())
    memory = Memory(*parts, *[None] * (len(Memory._fields) - len(parts)))
    return Stack(of, views, copies, blocks_of(_matrices(g, axes), p, memory), memory)


def _stacks(params: list[Tensor]) -> list[list[int]]:
    """Which of them are moved together: those of one shape, if they are small."""
    open_stacks: dict[tuple[int, ...], list[int]] = {}
    stacks = []
    for k, p in enumerate(params):
        shape = tuple(p.shape)
        stack = open_stacks.get(shape)
        if stack is None or (len(stack) + 1) * p.numel() > STACKED:
            stack = open_stacks[shape] = []
            stacks.append(stack)
        stack.append(k)
    return stacks


def _order(shape: tuple[int, ...]) -> list[int]:
    """The axes, the second longest and the longest one last."""
    last = factored_axes(shape) or ()
    return [k for k in range(len(shape)) if k not in last] + [*last]


def _stacked(tensors: list[Tensor]) -> Tensor:
    """In float32, contiguous: one tensor itself, if it is so already."""
    if len(tensors) == 1:
        return tensors[0].float().contiguous()[None]
    return torch.stack([one.float() for one in tensors])


def _matrices(stack: Tensor, axes: int) -> Tensor:
    """Of tensors of so many axes, with the shape that the arithmetic gives them."""
    lead, shape = stack.shape[: stack.dim() - axes], stack.shape[stack.dim() - axes :]
    if axes < 2:
        return stack.reshape(*lead, 1, -1, 1)
    return stack.view(*lead, math.prod(shape[:-2]), *shape[-2:])


def _sizes(weights: dict[str, Tensor], p: Tensor) -> Tensor:
    """The features of its size, and n: from the host once for each shape, then beside the weights.

    To copy from the host is to wait for the device.
    """
    name = f"sizes of {tuple(p.shape)}"
    if name not in weights:
        numbers = [*size_features(tuple(p.shape)), p.numel()]
        weights[name] = torch.tensor(numbers, dtype=torch.float32, device=p.device)
    return weights[name]
