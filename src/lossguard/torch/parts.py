"""The parts of a guard as plain containers: what is of each parameter, and what is not."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossguard.torch.tensors import clone, local

Saved = dict[str, Any]
Copy = list[Tensor]


class Part(NamedTuple):
    """A lane, or an optimizer when it was fresh.

    Attributes:
        name: under which it is saved.
        copies: parameters and buffers, by what they are.
        memory: of its optimizer, by parameter.
        options: of its optimizer's groups, as far as its steps change them.
        capturable: whether that keeps its counts on the device.
    """

    name: str
    copies: dict[str, Copy]
    memory: dict[Any, Any]
    options: list[Saved]
    capturable: bool


def pack(params: Sequence[Tensor], parts: Sequence[Part]) -> tuple[dict[int, Saved], list[Saved]]:
    """A copy of parts: what is of each parameter, and the rest of each part."""
    state: dict[int, Saved] = {k: {} for k in range(len(params))}
    rest = []
    for part in parts:
        for what, copy in part.copies.items():
            for k, (p, value) in enumerate(zip(params, copy, strict=False)):
                state[k][f"{part.name}.{what}"] = _sharded_as(p, value.clone())
        memory, theirs = clone(part.memory), {id(p): k for k, p in enumerate(params)}
        for p, entries in memory.items():
            if id(p) in theirs:
                state[theirs[id(p)]].update(
                    {f"{part.name}.memory.{key}": value for key, value in entries.items()}
                )
        rest.append(
            {
                "buffers": {
                    what: [t.clone() for t in copy[len(params) :]]
                    for what, copy in part.copies.items()
                },
                "others": {k: v for k, v in memory.items() if not isinstance(k, Tensor)},
                "options": clone(part.options),
            }
        )
    return state, rest


def unpack(
    params: Sequence[Tensor], parts: Sequence[Part], state: Sequence[Saved], rest: Sequence[Saved]
) -> list[Part]:
    """The parts that ``pack`` saved, copied, for a guard that has ``parts`` now.

    Raises:
        ValueError: if a tensor is missing, or has another shape.
    """
    return [
        Part(
            part.name,
            {
                what: [
                    *(_value(p, part, what, k, state[k]) for k, p in enumerate(params)),
                    *_buffers(params, part, what, theirs),
                ]
                for what in part.copies
            },
            {
                **{p: m for p, m in _memories(params, part, state) if m},
                **clone(theirs["others"]),
            },
            clone(theirs["options"]),
            part.capturable,
        )
        for part, theirs in zip(parts, rest, strict=True)
    ]


def _value(p: Tensor, part: Part, what: str, k: int, saved: Saved) -> Tensor:
    name = f"{part.name}.{what}"
    if name not in saved:
        if p.requires_grad:
            within = " (torch.distributed.checkpoint loads what was saved between two cycles)"
            raise ValueError(
                f"state_dict must hold {name} of each parameter, got one without"
                + (within if what == "before" else "")
            )
        return part.copies[what][k]  # torch.distributed.checkpoint leaves frozen ones out
    value = local(saved[name])
    if value.shape != local(p).shape:
        raise ValueError(
            f"state_dict must be of the same model, with a tensor of shape "
            f"{list(local(p).shape)}, got {list(value.shape)}"
        )
    return value.detach().to(local(p).device, local(p).dtype, copy=True)


def _buffers(params: Sequence[Tensor], part: Part, what: str, theirs: Saved) -> Copy:
    ours, saved = part.copies[what][len(params) :], theirs["buffers"].get(what, [])
    if [t.shape for t in ours] != [t.shape for t in saved]:
        raise ValueError(
            f"state_dict must be of the same model, with {len(ours)} buffers of its shapes, got "
            f"{len(saved)}"
        )
    return [s.detach().to(t.device, t.dtype, copy=True) for s, t in zip(saved, ours, strict=True)]


def _memories(
    params: Sequence[Tensor], part: Part, state: Sequence[Saved]
) -> Iterator[tuple[Tensor, Saved]]:
    prefix, copies = f"{part.name}.memory.", {}  # what parameters share they share again
    for p, saved in zip(params, state, strict=True):
        entries = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        entries = {key: clone(value, copies) for key, value in entries.items()}
        yield p, _placed(entries, p.device, part.capturable)


def _placed(value: Any, device: torch.device, capturable: bool) -> Any:
    """On the parameter's device, but for counts, which stay on the host; dtypes are as saved.

    ``Optimizer.load_state_dict`` casts floating state to the parameter's dtype, which would round
    the float32 moments of a bfloat16 parameter.
    """
    if isinstance(value, Tensor):
        return value.to(device) if value.dim() or capturable else value
    if isinstance(value, dict):
        return {key: _placed(item, device, capturable) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_placed(item, device, capturable) for item in value)
    return value


def _sharded_as(p: Tensor, value: Tensor) -> Tensor:
    if not hasattr(p, "to_local"):
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # pyright: ignore
    return DTensor.from_local(value, mesh, placements, shape=p.shape, stride=p.stride())
