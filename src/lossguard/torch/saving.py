"""A guard's ``state_dict``, in the layout of any optimizer's.

    state           by parameter: x.value, the model's; for each lane LANE.value, LANE.memory.KEY,
                    within a cycle LANE.before; fresh.K.memory.KEY of optimizer K when it was built:
                    plain tensors, or DTensors under fully_shard
    param_groups    the guard's; the first has numbers and buffers under ``guard``

So it is what torch.distributed.checkpoint saves under the names of parameters, and reshards.
"""

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lossguard.torch.memory import Memory
from lossguard.torch.packing import Parts, Saved, pack, unpack
from lossguard.torch.tensors import clone, read, transfer

if TYPE_CHECKING:
    from lossguard.torch.face import Face

COUNTS = ("phase", "steps")


def save(guard: "Face") -> Saved:
    """A copy of all that the rest of the run depends on."""
    guard._rates.apply()  # what is set, but not carried over, would be lost
    params, group, before = guard._weights.params, guard.param_groups[0], dict(guard.state)
    lanes, inners = list(guard._lanes.values()), guard._inners
    state, rest = pack(params, _parts(guard, within=guard.phase > 0))
    group["guard"] = {
        **_kind(guard),
        **{name: getattr(guard, name) for name in COUNTS},
        "leader": guard._leader.name,
        "running": [lane.name for lane in guard._others],
        "losses": [[read(lane.losses), read(lane.checks)] for lane in lanes],
        "lost": [lane.lost for lane in lanes],
        "scalers": [lane.scaler and lane.scaler.state_dict() for lane in lanes],
        "blank": [not lane.memory().state for lane in lanes],
        "own": [sorted(inner.own) for inner in inners],
        "copies": [sorted(inner.copies) for inner in inners],
        "options": [clone(inner.options()) for inner in inners],
        "rates": guard._rates.numbers(),
        "rest": rest,
        "rules": {name: _plain(attrgetter(name)(guard)) for name in guard.remembered},
    }
    try:
        guard.state.update(zip(params, state, strict=True))
        saved = Optimizer.state_dict(guard)
    finally:
        del group["guard"]
        guard.state.clear()
        guard.state.update(before)
    return {**saved, "param_groups": clone(saved["param_groups"])}


def load(guard: "Face", state_dict: Saved) -> None:
    """Go on from a saved state.

    Raises:
        ValueError: if it is of another guard. This one is as it was before, then.
    """
    groups = state_dict.get("param_groups", [])
    numbers = groups[0].get("guard", {}) if groups else {}
    kind = _kind(guard)
    if numbers.get("kind") != kind["kind"]:
        theirs = numbers.get("kind")
        theirs = f"a {theirs}'s" if theirs else f"one with the keys {list(state_dict)}"
        raise ValueError(f"state_dict must be a {kind['kind']}'s, got {theirs}")
    if (got := {name: numbers[name] for name in kind}) != kind:
        raise ValueError(f"state_dict must be of a guard with {kind}, got {got}")
    keys = [key for group in groups for key in group["params"]]
    params = guard._weights.params
    if len(keys) != len(params) or len(groups) != len(guard.param_groups):
        raise ValueError(
            f"state_dict must be of {len(params)} parameters in {len(guard.param_groups)} "
            f"groups, got one of {len(keys)} in {len(groups)}"
        )
    state = [state_dict["state"].get(key, {}) for key in keys]
    parts = unpack(params, _parts(guard, within=numbers["phase"] > 0), state, numbers["rest"])
    try:
        rules = {
            name: _like(attrgetter(name)(guard), numbers["rules"][name])
            for name in guard.remembered
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"state_dict must have the numbers of a {kind['kind']}, got others"
        ) from error
    _take(guard, numbers, groups, parts)
    for name, rule in rules.items():
        *path, last = name.split(".")
        setattr(attrgetter(path[0])(guard) if path else guard, last, rule)


def _take(guard: "Face", numbers: Saved, groups: list[Saved], parts: Parts) -> None:
    """Put everything in place; nothing here may fail."""
    lanes, copies = list(guard._lanes.values()), parts.copies
    memories = {name: Memory(*memory[:2]) for name, memory in parts.memories.items()}
    for k, inner in enumerate(guard._inners):
        inner.own, inner.copies = set(numbers["own"][k]), set(numbers["copies"][k])
        inner.fresh = memories[f"fresh.{k}.memory"]
    guard._weights.reshard()
    transfer(guard._weights.live(), copies["x.value"])
    of_lanes = (numbers[name] for name in ("blank", "losses", "lost", "scalers"))
    for lane, blank, losses, lost, scale in zip(lanes, *of_lanes, strict=True):
        memory = memories[f"{lane.name}.memory"]
        transfer(lane.values, copies[f"{lane.name}.value"])
        lane.before = copies.get(f"{lane.name}.before")
        lane.remember(Memory({} if blank else memory.state, memory.options))
        lane.losses, lane.checks = (lane.tensors(row) for row in losses)
        lane.lost, lane.live = lost, lane.name == numbers["leader"]
        if lane.scaler is not None and scale:
            lane.scaler.load_state_dict(dict(scale))
    guard._leader = guard._lanes[numbers["leader"]]
    guard._others = [guard._lanes[name] for name in numbers["running"]]
    for inner, options in zip(guard._inners, numbers["options"], strict=True):
        for group, entries in zip(inner.optimizer.param_groups, options, strict=True):
            group.update({k: v for k, v in clone(entries).items() if k not in inner.own})
    for group, entries in zip(guard.param_groups, groups, strict=True):
        group.update({k: v for k, v in entries.items() if k not in ("params", "guard")})
    guard._rates.load(numbers["rates"])
    for name in COUNTS:
        setattr(guard, name, numbers[name])
    guard._filled = False
    guard.state.update({p: {} for p in guard._weights.params})


def _kind(guard: "Face") -> Saved:
    """What two guards must have in common."""
    lanes = list(guard._lanes)
    return {"kind": type(guard).__name__, "lanes": lanes, "nt": guard.nt, "nc": guard.nc}


def _parts(guard: "Face", *, within: bool) -> Parts:
    """The model, the lanes and the fresh memories, as they are."""
    lanes = guard._lanes.values()
    for lane in lanes:
        lane.inner.note(lane.memory())
    copies = {"x.value": guard._weights.live()}
    copies |= {f"{lane.name}.value": lane.values for lane in lanes}
    if within:
        copies |= {f"{lane.name}.before": lane.before or lane.values for lane in lanes}
    memories = {}
    for lane in lanes:
        state, options = lane.memory()
        filled = state or lane.inner.zeros()
        memories[f"{lane.name}.memory"] = filled, options, lane.inner.is_capturable
    for k, inner in enumerate(guard._inners):
        memories[f"fresh.{k}.memory"] = *inner.fresh, inner.is_capturable
    return Parts(copies, memories)


def _plain(value: Any) -> Any:
    """Lists and numbers, from tuples with names too."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _like(ours: Any, saved: Any) -> Any:
    """What ``_plain`` made of something of this kind."""
    if hasattr(ours, "_fields"):
        return type(ours)(*(_like(a, b) for a, b in zip(ours, saved, strict=True)))
    return clone(saved)
