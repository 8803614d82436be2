"""A guard's ``state_dict``, in the layout of any optimizer's.

    state           by parameter: x.value, the model's; for each lane LANE.value, LANE.memory.KEY,
                    within a cycle LANE.before: plain tensors, or DTensors under fully_shard
    param_groups    the guard's; the first has numbers and buffers under ``guard``

So it is what torch.distributed.checkpoint saves under the names of parameters, and reshards.
"""

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.memory import Memory
from lossguard.torch.ranks import check_rank, sharded_as, this_rank
from lossguard.torch.tensors import clone, local, read, transfer

if TYPE_CHECKING:
    from lossguard.torch.guard import Guard
    from lossguard.torch.lane import Lane
    from lossguard.torch.weights import Copy

Saved = dict[str, Any]


def save(guard: "Guard") -> Saved:
    """A copy of all that the rest of the run depends on."""
    guard._rates.apply()  # what is set, but not carried over, would be lost
    params, group, before = guard._weights.params, guard.param_groups[0], dict(guard.state)
    state: list[Saved] = [{} for _ in params]
    group["guard"] = {
        **_kind(guard),
        "rank": this_rank(),
        "phase": guard.phase,
        "steps": guard.steps,
        "leader": guard._leader.name,
        "running": [lane.name for lane in guard._others],
        "rates": guard._rates.numbers(),
        "rules": {name: _plain(attrgetter(name)(guard)) for name in guard.remembered},
        "optimizers": {
            k: [sorted(inner.own), sorted(inner.copies), clone(inner.options())]
            for k, inner in guard._inners.items()
        },
        "memories": {lane.name: _pack(lane, params, state) for lane in guard._lanes.values()},
        "buffers": {},
    }
    for name, copy in _copies(guard).items():
        for p, entries, value in zip(params, state, copy, strict=False):
            entries[name] = sharded_as(p, value.clone())
        group["guard"]["buffers"][name] = [t.clone() for t in copy[len(params) :]]
    try:
        guard.state.update(zip(params, state, strict=True))
        saved = Optimizer.state_dict(guard)
    finally:
        del group["guard"]
        guard.state.clear()
        guard.state.update(before)
    return {**saved, "param_groups": clone(saved["param_groups"])}


def load(guard: "Guard", state_dict: Saved) -> None:
    """Go on from a saved state.

    Raises:
        ValueError: if it is of another guard. This one is as it was before, then.
    """
    groups = state_dict.get("param_groups", [])
    numbers = groups[0].get("guard", {}) if groups else {}
    params, state = guard._weights.params, _checked(guard, state_dict, numbers)
    live, lanes = guard._weights.live(), guard._lanes.values()
    copies = {
        name: [
            *(
                _value(p, name, saved, ours, numbers["rank"])
                for p, saved, ours in zip(params, state, live, strict=False)
            ),
            *_buffers(live[len(params) :], buffers),
        ]
        for name, buffers in numbers["buffers"].items()
    }
    memories = [_unpack(lane, params, state, numbers["memories"][lane.name]) for lane in lanes]
    try:
        rules = {
            name: _like(attrgetter(name)(guard), numbers["rules"][name])
            for name in guard.remembered
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"state_dict must have the numbers of a {type(guard).__name__}, got others"
        ) from error

    # From here on nothing may fail.
    for name, rule in rules.items():
        path, _, last = name.rpartition(".")
        setattr(attrgetter(path)(guard) if path else guard, last, rule)
    for inner, (own, held, _) in zip(
        guard._inners.values(), numbers["optimizers"].values(), strict=True
    ):
        inner.own, inner.copies = set(own), set(held)
    guard._weights.reshard()
    transfer(guard._weights.live(), copies["x.value"])
    for lane, memory in zip(lanes, memories, strict=True):
        transfer(lane.values, copies[f"{lane.name}.value"])
        lane.before = copies.get(f"{lane.name}.before")
        lane.remember(memory)
        losses, checks = numbers["memories"][lane.name]["losses"]
        lane.losses, lane.checks = lane.tensors(losses), lane.tensors(checks)
        lane.live = lane.name == numbers["leader"]
    guard._leader = guard._lanes[numbers["leader"]]
    guard._others = [guard._lanes[name] for name in numbers["running"]]
    for inner, (*_, options) in zip(
        guard._inners.values(), numbers["optimizers"].values(), strict=True
    ):
        for group, entries in zip(inner.optimizer.param_groups, options, strict=True):
            group.update({k: v for k, v in clone(entries).items() if k not in inner.own})
    for group, entries in zip(guard.param_groups, groups, strict=True):
        group.update({k: v for k, v in entries.items() if k not in ("params", "guard")})
    guard._rates.load(numbers["rates"])
    guard.phase, guard.steps = numbers["phase"], numbers["steps"]


def _kind(guard: "Guard") -> Saved:
    """What two guards must have in common."""
    lanes = list(guard._lanes)
    return {"kind": type(guard).__name__, "lanes": lanes, "nt": guard.nt, "nc": guard.nc}


def _checked(guard: "Guard", state_dict: Saved, numbers: Saved) -> list[Saved]:
    """What is saved of each parameter; refuse the state of another guard."""
    kind, params, groups = _kind(guard), guard._weights.params, state_dict.get("param_groups", [])
    if numbers.get("kind") != kind["kind"]:
        theirs = numbers.get("kind")
        theirs = f"a {theirs}'s" if theirs else f"one with the keys {list(state_dict)}"
        raise ValueError(f"state_dict must be a {kind['kind']}'s, got {theirs}")
    if (got := {name: numbers[name] for name in kind}) != kind:
        raise ValueError(f"state_dict must be of a guard with {kind}, got {got}")
    keys = [key for group in groups for key in group["params"]]
    if len(keys) != len(params) or len(groups) != len(guard.param_groups):
        raise ValueError(
            f"state_dict must be of {len(params)} parameters in {len(guard.param_groups)} "
            f"groups, got one of {len(keys)} in {len(groups)}"
        )
    return [state_dict["state"].get(key, {}) for key in keys]


def _copies(guard: "Guard") -> "dict[str, Copy]":
    """Parameters and buffers, of the model and of every lane."""
    copies = {"x.value": guard._weights.live()}
    for lane in guard._lanes.values():
        copies[f"{lane.name}.value"] = lane.values
        if guard.phase and lane.before is not None:
            copies[f"{lane.name}.before"] = lane.before
    return copies


def _pack(lane: "Lane", params: list[Tensor], state: list[Saved]) -> Saved:
    """What a lane remembers: of parameters into ``state``, the rest is returned."""
    kept, options = Memory(lane.filled(), lane.memory().options).copy()
    for p, entries in zip(params, state, strict=True):
        made = kept.pop(p, {}).items()
        entries.update({f"{lane.name}.memory.{key}": value for key, value in made})
    return {
        "blank": not lane.memory().state,
        "others": kept,
        "options": options,
        "losses": [read(lane.losses), read(lane.checks)],
    }


def _unpack(lane: "Lane", params: list[Tensor], state: list[Saved], rest: Saved) -> Memory:
    """The inverse. Counts stay on the host, where optimizers without ``capturable`` have them."""
    groups, name = lane.optimizer.param_groups, f"{lane.name}.memory."
    options = clone(rest["options"])
    if rest["blank"]:
        return Memory({}, options)
    on_device = any(group.get("capturable") or group.get("fused") for group in groups)
    kept, copies = clone(rest["others"]), {}  # what parameters share is shared again
    for p, entries in zip(params, state, strict=True):

        def placed(t: Tensor, device: torch.device = p.device) -> Tensor:
            return t.detach().to(device if t.dim() or on_device else t.device, copy=True)

        made = {
            key.removeprefix(name): clone(value, copies, placed)
            for key, value in entries.items()
            if key.startswith(name)
        }
        if made:
            kept[p] = made
    if not kept:
        raise ValueError(f"state_dict must hold {name}* of parameters, got none")
    return Memory(kept, options)


def _value(p: Tensor, name: str, saved: Saved, ours: Tensor, rank: int) -> Tensor:
    if name not in saved:
        if p.requires_grad:
            raise ValueError(
                f"state_dict must hold {name} of each parameter, got one without (save between two "
                "cycles for torch.distributed.checkpoint)"
            )
        return ours.clone()  # torch.distributed.checkpoint leaves frozen ones out
    check_rank(p, saved[name], rank, "state_dict")
    value = local(saved[name])
    if value.shape != ours.shape:
        raise ValueError(
            f"state_dict must be of the same model, with a tensor of shape {list(ours.shape)}, got "
            f"{list(value.shape)}"
        )
    return value.detach().to(ours.device, ours.dtype, copy=True)


def _buffers(ours: "Copy", saved: "Copy") -> "Copy":
    if [t.shape for t in ours] != [t.shape for t in saved]:
        raise ValueError(
            f"state_dict must be of the same model, with {len(ours)} buffers of its shapes, got "
            f"{len(saved)}"
        )
    return [s.detach().to(t.device, t.dtype, copy=True) for s, t in zip(saved, ours, strict=True)]


def _plain(value: Any) -> Any:
    """Lists and numbers, from tuples with names too."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _like(ours: Any, saved: Any) -> Any:
    """What ``_plain`` made of something of this kind."""
    if hasattr(ours, "_fields"):
        return type(ours)(*(_like(a, b) for a, b in zip(ours, saved, strict=True)))
    if isinstance(ours, list) and any(hasattr(one, "_fields") for one in ours):
        return [_like(a, b) for a, b in zip(ours, saved, strict=True)]
    return clone(saved)
