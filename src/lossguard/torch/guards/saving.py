"""A guard's ``state_dict``, in the layout of any optimizer's.

    state           by parameter, for each lane: LANE.value, of the leader the model's,
                    LANE.before, where it was when the cycle began, and LANE.memory.KEY:
                    plain tensors, or DTensors under fully_shard
    param_groups    the guard's; the first has all else under ``guard``, as bytes of torch.save

So it is what torch.distributed.checkpoint saves under the names of parameters, and reshards.
"""

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.distributed import check_rank, sharded_as, this_rank
from lossguard.torch.guards.memory import Copy, Kept, Memory
from lossguard.torch.tensors import clones, leaves, local
from lossguard.validation import check_kind

if TYPE_CHECKING:
    from lossguard.torch.guards.lane import Lane

Saved = dict[str, Any]
PLAIN = bool | int | float | complex | str | bytes | None | np.generic | Tensor
"""What ``torch.load`` takes from anybody, and NumPy's numbers, which are made so."""


def packed(
    guard: Optimizer, params: Sequence[Tensor], kept: Mapping[str, Kept], rest: Saved
) -> Saved:
    """A ``state_dict`` of what is kept of each lane, and of the rest."""
    state: list[Saved] = [{} for _ in params]
    lanes = {name: _pack(name, one, params, state) for name, one in kept.items()}
    rest = _plain({**rest, "rank": this_rank(), "lanes": lanes})
    guard.state.update(zip(params, state, strict=True))
    guard.param_groups[0]["guard"] = folded(rest)
    try:
        saved = Optimizer.state_dict(guard)
    finally:
        del guard.param_groups[0]["guard"]
        guard.state.update({p: {} for p in params})
    saved["param_groups"] = copy.deepcopy([_plain(one) for one in saved["param_groups"]])
    return saved


def opened(state_dict: Saved, p: Tensor) -> tuple[list[Saved], list[Saved], Saved]:
    """The state of each parameter, the groups, and the rest, for a guard of p and others."""
    check_kind("state_dict", state_dict, dict, "torch.load(path)")
    groups = copy.deepcopy(state_dict.get("param_groups", []))
    rest = unfolded(groups[0].pop("guard", b""), p) if groups else {}
    entries = state_dict.get("state", {})
    state = [entries.get(key, {}) for group in groups for key in group["params"]]
    return state, groups, rest


def folded(rest: Saved) -> bytes:
    """In one piece: what goes through lists in a state takes those of one length for granted."""
    file = io.BytesIO()
    torch.save(rest, file)
    return file.getvalue()


def unfolded(rest: bytes, p: Tensor) -> Saved:
    """What was on the host stays there, the rest comes to the device of the parameters."""

    def place(storage: Any, where: str) -> Any:
        to = torch.serialization.default_restore_location
        return storage if where == "cpu" else to(storage, str(p.device))

    return torch.load(io.BytesIO(rest), place, weights_only=True) if rest else {}


def filled(like: list[Any], numbers: Sequence[Any], kind: str) -> list[Any]:
    """Lists and named tuples of this kind, of the numbers that ``leaves`` has found in others."""
    if len(numbers) != len(list(leaves(like))):
        raise ValueError(f"state_dict must have the numbers of a {kind}, got {len(numbers)}")
    return _filled(like, iter(numbers))


def _filled(like: Any, numbers: Iterator[Any]) -> Any:
    if not isinstance(like, (list, tuple)):
        return next(numbers)
    items = [_filled(one, numbers) for one in like]
    return type(like)(*items) if isinstance(like, tuple) else items


def _plain(value: Any) -> Any:
    """What loads safely; options of other kinds are as the optimizer was built with them."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if _is_plain(one)}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _is_plain(value: Any) -> bool:
    return all(isinstance(leaf, PLAIN) for leaf in leaves(value))


def _pack(name: str, kept: Kept, params: Sequence[Tensor], state: list[Saved]) -> Saved:
    """Of a lane, what is of parameters into ``state``; the rest is returned.

    States of all times have the same tensors, so that any can be loaded in place of a new one.
    """
    copies = {"value": clones(kept.values), "before": clones(kept.before or kept.values)}
    memory = kept.memory.copy()
    for k, (p, entries) in enumerate(zip(params, state, strict=True)):
        for which, values in copies.items():
            entries[f"{name}.{which}"] = sharded_as(p, values[k])
        for key, value in memory.state.pop(p, {}).items():
            if not isinstance(key, str):
                raise ValueError(
                    f"memory of a parameter must have strings as names to be saved, got {key!r}"
                )
            entries[f"{name}.memory.{key}"] = value
    return {
        "goes_back": bool(kept.before),
        "buffers": {which: values[len(params) :] for which, values in copies.items()},
        "blank": kept.blank,
        "others": memory.state,
        "options": list(map(_plain, memory.options)),
        "losses": kept.losses,
        "warm_up": kept.warm_up,
    }


def unpacked(lane: "Lane", params: Sequence[Tensor], state: list[Saved], rest: Saved) -> Kept:
    """What is kept of a lane."""
    saved, rank = rest["lanes"][lane.name], rest["rank"]
    values, before = (
        _values(lane, which, params, state, saved["buffers"].get(which, []), rank)
        for which in ("value", "before")
    )
    memory = {} if saved["blank"] else _memory(lane, params, state, saved["others"])
    pairs = zip(lane.memory.now.options, saved["options"], strict=True)
    options = [{k: v for k, v in now.items() if not _is_plain(v)} | then for now, then in pairs]
    return Kept(
        values=values,
        before=before if saved["goes_back"] else [],
        memory=Memory(memory, options),
        blank=saved["blank"],
        losses=list(map(float, saved["losses"])),
        warm_up=int(saved["warm_up"]),
    )


def _values(
    lane: "Lane",
    which: str,
    params: Sequence[Tensor],
    state: list[Saved],
    buffers: list[Tensor],
    rank: int,
) -> Copy:
    """A copy, in the place, shapes and dtypes of the lane's own."""
    name, found = f"{lane.name}.{which}", []
    for p, entries, ours in zip(params, state, lane.point, strict=False):
        if name not in entries and p.requires_grad:
            raise ValueError(f"state_dict must hold {name} of each parameter, got one without")
        value = entries.get(name, ours)  # torch.distributed.checkpoint leaves frozen ones out
        check_rank(p, value, rank, "state_dict")
        found.append(local(value))
    found += buffers
    shapes = ([list(tensor.shape) for tensor in tensors] for tensors in (lane.point, found))
    for ours, theirs in zip_longest(*shapes):
        if ours != theirs:
            raise ValueError(
                f"state_dict must be of the same model, with a tensor of shape {ours}, got {theirs}"
            )
    pairs = zip(lane.point, found, strict=True)
    return [value.detach().to(o.device, o.dtype, copy=True) for o, value in pairs]


def _memory(
    lane: "Lane", params: Sequence[Tensor], state: list[Saved], others: dict[Any, Any]
) -> dict[Any, Any]:
    """Counts stay on the host, where optimizers without ``capturable`` have them."""
    groups, name = lane.optimizer.param_groups, f"{lane.name}.memory."
    on_device = any(group.get("capturable") or group.get("fused") for group in groups)
    of_params = copy.deepcopy(  # at once: what parameters share is shared in the copy
        [
            {key.removeprefix(name): value for key, value in saved.items() if key.startswith(name)}
            for saved in state
        ]
    )
    made = {p: entries for p, entries in zip(params, of_params, strict=True) if entries}
    if not (made or others):
        raise ValueError(f"state_dict must hold {name}* of parameters, got none")
    for p, entries in made.items():
        for key, entry in entries.items():
            moves = on_device or (p.dim() == 0 and key != "step")  # what has no dimension
            for t in leaves(entry):
                if isinstance(t, Tensor) and t.device != p.device and (t.dim() or moves):
                    t.data = t.to(p.device)
    return others | made
