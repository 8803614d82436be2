"""A guard's ``state_dict``, in the layout of any optimizer's.

    state           by parameter, for each lane: LANE.value, of the leader the model's,
                    LANE.memory.KEY, and within a cycle LANE.before, of those that may go back:
                    plain tensors, or DTensors under fully_shard
    param_groups    the guard's; the first has numbers and buffers under ``guard``

So it is what torch.distributed.checkpoint saves under the names of parameters, and reshards.
"""

import copy
from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.arguments import told_if_damaged
from lossguard.torch.memory import Memory
from lossguard.torch.ranks import are_running, check_rank, sharded_as, this_rank
from lossguard.torch.tensors import clones, leaves, local, read, transfer
from lossguard.validation import check_count

if TYPE_CHECKING:
    from lossguard.torch.guard import Guard
    from lossguard.torch.lane import Lane
    from lossguard.torch.weights import Copy

Saved = dict[str, Any]


def save(guard: "Guard") -> Saved:
    """A copy of all that the rest of the run depends on."""
    guard._rates.apply()  # what is set, but not carried over, would be lost
    params, group, before = guard._weights.params, guard.param_groups[0], dict(guard.state)
    state, copies = [{} for _ in params], _copies(guard)
    for name, values in copies.items():
        for p, entries, value in zip(params, state, values, strict=False):
            entries[name] = sharded_as(p, value.clone())
    group["guard"] = {
        **_kind(guard),
        "rank": this_rank(),
        "phase": guard.phase,
        "steps": guard.steps,
        "leader": guard._leader.name,
        "running": [lane.name for lane in guard._others],
        "rules": list(leaves([getattr(*place) for place in _rules(guard)])),
        "optimizers": {
            name: [sorted(inner.own), sorted(inner.copies), inner.options()]
            for name, inner in guard._inners.items()
        },
        "memories": {lane.name: _pack(lane, params, state) for lane in guard._lanes.values()},
        "buffers": {name: values[len(params) :] for name, values in copies.items()},
    }
    try:
        guard.state.update(zip(params, state, strict=True))
        saved = Optimizer.state_dict(guard)
    finally:
        del group["guard"]
        guard.state.clear()
        guard.state.update(before)
    return {**saved, "param_groups": copy.deepcopy(saved["param_groups"])}


def load(guard: "Guard", state_dict: Saved) -> None:
    """Go on from a saved state.

    Raises:
        ValueError: if it is of another guard, or damaged. This one is as it was before, then.
    """
    params = guard._weights.params
    with told_if_damaged("state_dict"):
        groups = copy.deepcopy(state_dict.get("param_groups", []))
        numbers = groups[0].pop("guard", {}) if groups else {}
        state = _checked(guard, state_dict, groups, numbers)
        copies = {
            name: _values(guard, name, state, buffers, numbers["rank"])
            for name, buffers in numbers["buffers"].items()
        }
        lanes = []
        for name, lane in guard._lanes.items():
            memory, losses = _unpack(lane, params, state, numbers["memories"][name])
            lanes.append((lane, copies[f"{name}.value"], memory, losses))
        rules, count = [getattr(*place) for place in _rules(guard)], len(numbers["rules"])
        if count != len(list(leaves(rules))):
            raise ValueError(
                f"state_dict must have the numbers of a {numbers['kind']}, got {count}"
            )
        rules = _filled(rules, iter(numbers["rules"]))
        inners = []
        for name, inner in guard._inners.items():
            own, of_params, options = map(numbers["optimizers"][name].__getitem__, range(3))
            inners.append((inner, set(own), set(of_params), _of_groups(inner.optimizer, options)))
        leader, *running = (guard._lanes[n] for n in (numbers["leader"], *numbers["running"]))
        phase = check_count("phase", numbers["phase"], least=0, most=guard.nt + guard.nc)
        steps = check_count("steps", numbers["steps"], least=0)

    # From here on nothing may fail.
    for (owner, name), rule in zip(_rules(guard), rules, strict=True):
        setattr(owner, name, rule)
    for inner, own, of_params, options in inners:
        inner.own, inner.copies = own, of_params
        for group, entries in zip(inner.optimizer.param_groups, options, strict=True):
            group.update({k: v for k, v in entries.items() if k not in own})
    for lane, value, memory, losses in lanes:
        lane.losses, lane.checks = losses
        lane.values, lane.before = value, copies.get(f"{lane.name}.before", [])
        lane.remember(memory)
    guard._leader = guard._weights.holder = leader
    guard._weights.write(leader.values)
    guard._others = running
    for group, entries in zip(guard.param_groups, groups, strict=True):
        group.update({k: v for k, v in entries.items() if k != "params"})
    guard._rates.note()
    guard.phase, guard.steps = phase, steps


def _kind(guard: "Guard") -> Saved:
    """What two guards must have in common."""
    lanes = list(guard._lanes)
    return {"kind": type(guard).__name__, "lanes": lanes, "nt": guard.nt, "nc": guard.nc}


def _rules(guard: "Guard") -> list[tuple[Any, str]]:
    """Who has each number or record that rules and rates remember, and by which name."""
    names = ("_rates.base", "_rates.bases", "_rates.given", *guard.remembered)
    paths = [name.split(".") for name in names]
    return [(reduce(getattr, owners, guard), last) for *owners, last in paths]


def _filled(like: Any, numbers: Iterator[Any]) -> Any:
    """Lists and named tuples of this kind, of the next numbers."""
    if not isinstance(like, (list, tuple)):
        return next(numbers)
    items = [_filled(one, numbers) for one in like]
    return type(like)(*items) if isinstance(like, tuple) else items


def _checked(guard: "Guard", state_dict: Saved, groups: list[Saved], numbers: Saved) -> list[Saved]:
    """What is saved of each parameter; refuse the state of another guard."""
    kind, params = _kind(guard), guard._weights.params
    got = {name: numbers.get(name) for name in kind}
    if got != kind:
        other = (
            f"one with the keys {list(state_dict)} (an optimizer's own goes into the fallback, "
            "before the guard is built)"
        )
        raise ValueError(
            f"state_dict must be of a guard with {kind}, got {got if numbers else other}"
        )
    keys = [key for group in groups for key in group["params"]]
    if len(keys) != len(params) or len(groups) != len(guard.param_groups):
        raise ValueError(
            f"state_dict must be of {len(params)} parameters in {len(guard.param_groups)} "
            f"groups, got one of {len(keys)} in {len(groups)}"
        )
    return [state_dict["state"].get(key, {}) for key in keys]


def _copies(guard: "Guard") -> "dict[str, Copy]":
    """The parameters and buffers of every lane."""
    copies = {}
    for lane in guard._lanes.values():
        copies[f"{lane.name}.value"] = lane.point
        if guard.phase and lane.before:
            copies[f"{lane.name}.before"] = lane.before
    return copies


def _values(
    guard: "Guard", name: str, state: list[Saved], buffers: list[Tensor], rank: int
) -> "Copy":
    """One of the copies, in the place, shapes and dtypes of the model."""
    live, params, saved = guard._weights.live(), guard._weights.params, []
    for p, entries, ours in zip(params, state, live, strict=False):
        if name not in entries and p.requires_grad:
            raise ValueError(
                f"state_dict must hold {name} of each parameter, got one without (save between two "
                "cycles for torch.distributed.checkpoint)"
            )
        value = entries.get(name, ours)  # torch.distributed.checkpoint leaves frozen ones out
        check_rank(p, value, rank, "state_dict")
        saved.append(local(value))
    saved += buffers
    if len(saved) != len(live):
        raise ValueError(
            f"state_dict must be of the same model, with {len(live) - len(params)} buffers, got "
            f"{len(buffers)}"
        )
    for ours, value in zip(live, saved, strict=True):
        if value.shape != ours.shape:
            raise ValueError(
                "state_dict must be of the same model, with a tensor of shape "
                f"{list(ours.shape)}, got {list(value.shape)}"
            )
    return [s.detach().to(o.device, o.dtype, copy=True) for o, s in zip(live, saved, strict=True)]


def _pack(lane: "Lane", params: list[Tensor], state: list[Saved]) -> Saved:
    """What a lane remembers: of parameters into ``state``, the rest is returned."""
    kept = Memory(_made(lane), []).copy().state
    for p, entries in zip(params, state, strict=True):
        made = kept.pop(p, {}).items()
        entries.update({f"{lane.name}.memory.{key}": value for key, value in made})
    return {
        "blank": not lane.memory().state,
        "others": kept,
        "options": lane.memory().options,
        "losses": [read(lane.losses), read(lane.checks)],
    }


def _made(lane: "Lane") -> dict[Any, Any]:
    """The state of its optimizer; before the first step what such a step makes, where ranks are.

    torch.distributed.checkpoint loads only what is there on both sides.
    """
    state = lane.memory().state or lane.inner.memory().state
    if state or not are_running():
        return state
    weights, previous = lane.weights, lane.inner.memory()
    values = clones(weights.live())
    try:
        for p in weights.params:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        lane.switch("train")
        lane.update(0.0)
    finally:
        made = lane.inner.exchange(previous)
        weights.clear_gradients()
        transfer(weights.live(), values)
    return made.state


def _unpack(
    lane: "Lane", params: list[Tensor], state: list[Saved], rest: Saved
) -> tuple[Memory, list[list[Tensor]]]:
    """What a lane remembers, and its losses of the cycle so far, in training and in the check."""
    rows = rest["losses"][0], rest["losses"][1]
    losses = [[torch.tensor(float(n), dtype=torch.float64) for n in row] for row in rows]
    kept = {} if rest["blank"] else _unpack_state(lane, params, state, rest["others"])
    return Memory(kept, _of_groups(lane.optimizer, rest["options"])), losses


def _unpack_state(
    lane: "Lane", params: list[Tensor], state: list[Saved], others: dict[Any, Any]
) -> dict[Any, Any]:
    """Counts stay on the host, where optimizers without ``capturable`` have them."""
    groups, name = lane.optimizer.param_groups, f"{lane.name}.memory."
    on_device = any(group.get("capturable") or group.get("fused") for group in groups)
    of_params = [
        {key.removeprefix(name): value for key, value in saved.items() if key.startswith(name)}
        for saved in state
    ]
    # what parameters share is shared in the copy
    of_params = copy.deepcopy(of_params)
    kept = others | {p: made for p, made in zip(params, of_params, strict=True) if made}
    for p in params:
        for t in leaves(kept.get(p)):
            if isinstance(t, Tensor) and t.device != p.device and (t.dim() or on_device):
                t.data = t.to(p.device)
    if not kept:
        raise ValueError(f"state_dict must hold {name}* of parameters, got none")
    return kept


def _of_groups(optimizer: Optimizer, options: list[Saved]) -> list[Saved]:
    """Entries of each of its parameter groups."""
    count = len(optimizer.param_groups)
    if len(options) != count:
        raise ValueError(f"state_dict must have entries of {count} groups, got {len(options)}")
    return [dict(entries) for entries in options]
