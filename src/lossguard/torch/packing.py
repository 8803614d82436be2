"""Lanes as plain containers: what is of each parameter, and what is not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from lossguard.torch.tensors import clone, local

Saved = dict[str, Any]
Copy = list[Tensor]


class Parts(NamedTuple):
    """All that a guard has beside numbers, by name.

    Attributes:
        copies: parameters and buffers.
        memories: of optimizers: what is of parameters, the options of groups, and whether it keeps
            its counts on the device.
    """

    copies: Mapping[str, Copy]
    memories: Mapping[str, tuple[Saved, list[Saved], bool]]


def pack(params: Sequence[Tensor], parts: Parts) -> tuple[list[Saved], Saved]:
    """A copy: what is of each parameter, and the rest."""
    n = len(params)
    state: list[Saved] = [{} for _ in params]
    rest: Saved = {"rank": this_rank(), "buffers": {}, "others": {}, "options": {}}
    for name, copy in parts.copies.items():
        for p, entries, value in zip(params, state, copy, strict=False):
            entries[name] = _sharded_as(p, value.clone())
        rest["buffers"][name] = [t.clone() for t in copy[n:]]
    of = {id(p): entries for p, entries in zip(params, state, strict=True)}
    for name, (remembered, options, _) in parts.memories.items():
        remembered = clone(remembered)
        for p, entries in remembered.items():
            if id(p) in of:
                of[id(p)].update({f"{name}.{key}": value for key, value in entries.items()})
        rest["options"][name] = clone(options)
        rest["others"][name] = {k: v for k, v in remembered.items() if not isinstance(k, Tensor)}
    return state, rest


def unpack(params: Sequence[Tensor], parts: Parts, state: Sequence[Saved], rest: Saved) -> Parts:
    """The parts that ``pack`` saved, copied, for a guard that has ``parts`` now.

    Raises:
        ValueError: if a tensor is missing, has another shape, or is another rank's shard.
    """
    n = len(params)
    copies = {
        name: [
            *(
                _value(p, name, saved, ours, rest["rank"])
                for p, saved, ours in zip(params, state, copy, strict=False)
            ),
            *_buffers(copy[n:], rest["buffers"].get(name, [])),
        ]
        for name, copy in parts.copies.items()
    }
    memories = {}
    for name, (_, _, capturable) in parts.memories.items():
        remembered, shared = (
            clone(rest["others"][name]),
            {},
        )  # what parameters share is shared again
        for p, saved in zip(params, state, strict=True):
            made = {
                key.removeprefix(f"{name}."): _placed(clone(value, shared), p.device, capturable)
                for key, value in saved.items()
                if key.startswith(f"{name}.")
            }
            if made:
                remembered[p] = made
        memories[name] = remembered, clone(rest["options"][name]), capturable
    return Parts(copies, memories)


def _value(p: Tensor, name: str, saved: Saved, ours: Tensor, rank: int) -> Tensor:
    if name not in saved:
        if p.requires_grad:
            within = " (torch.distributed.checkpoint loads what was saved between two cycles)"
            raise ValueError(
                f"state_dict must hold {name} of each parameter, got one without"
                + (within if name.endswith(".before") else "")
            )
        return ours.clone()  # torch.distributed.checkpoint leaves frozen ones out
    check_rank(p, saved[name], rank, "state_dict")
    value = local(saved[name])
    if value.shape != local(p).shape:
        raise ValueError(
            f"state_dict must be of the same model, with a tensor of shape "
            f"{list(local(p).shape)}, got {list(value.shape)}"
        )
    return value.detach().to(local(p).device, local(p).dtype, copy=True)


def _buffers(ours: Copy, saved: Copy) -> Copy:
    if [t.shape for t in ours] != [t.shape for t in saved]:
        raise ValueError(
            f"state_dict must be of the same model, with {len(ours)} buffers of its shapes, got "
            f"{len(saved)}"
        )
    return [s.detach().to(t.device, t.dtype, copy=True) for s, t in zip(saved, ours, strict=True)]


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


def check_rank(ours: Tensor, saved: Any, rank: int, name: str) -> None:
    """Refuse a shard that ``torch.save`` wrote on another rank: it looks like this rank's own.

    What torch.distributed.checkpoint loads has been put in place on this rank.
    """
    mesh, here = getattr(saved, "device_mesh", None), this_rank()
    if mesh is not None and mesh is not getattr(ours, "device_mesh", None) and rank != here:
        raise ValueError(
            f"{name} must be of rank {here}'s own shards, got rank {rank}'s (save and load by "
            "torch.distributed.checkpoint)"
        )


def this_rank() -> int:
    running = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if running else 0


def _sharded_as(p: Tensor, value: Tensor) -> Tensor:
    if not hasattr(p, "to_local"):
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # pyright: ignore
    return DTensor.from_local(value, mesh, placements, shape=p.shape, stride=p.stride())
