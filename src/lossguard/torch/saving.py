"""A guard's ``state_dict``, in the layout of any optimizer's.

    state           by parameter, for each lane: LANE.value, of the leader the model's,
                    LANE.before, where it was when the cycle began, and LANE.memory.KEY:
                    plain tensors, or DTensors under fully_shard
    param_groups    the guard's; the first has all else under ``guard``, as bytes of torch.save

So it is what torch.distributed.checkpoint saves under the names of parameters, and reshards.
"""

import copy
import io
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.arguments import scalar
from lossguard.torch.distributed import check_rank, sharded_as, this_rank
from lossguard.torch.rates import PARAMS, SETTINGS
from lossguard.torch.state import Memory
from lossguard.torch.tensors import clones, leaves, local, stacked, transfer
from lossguard.validation import check_kind, named

if TYPE_CHECKING:
    from lossguard.torch.guards.cycle import Guard
    from lossguard.torch.guards.lane import Copy, Lane

Saved = dict[str, Any]
PLAIN = bool | int | float | complex | str | bytes | None | np.generic | Tensor
"""What ``torch.load`` takes from anybody, and NumPy's numbers, which are made so."""


def save(guard: "Guard") -> Saved:
    """A copy of all that the rest of the run depends on."""
    guard.check_between("state_dict")
    guard._rates.apply()  # what is set, but not carried over, would be lost
    params, group = guard._weights.params, guard.param_groups[0]
    draws = guard._randomness.state()
    state: list[Saved] = [{} for _ in params]
    lanes = {name: _pack(lane, state, guard.phase > 0) for name, lane in guard._lanes.items()}
    rest = {
        "kind": _kind(guard),
        "rank": this_rank(),
        "leader": guard._leader.name,
        "running": [lane.name for lane in guard._others],
        "numbers": list(leaves(_numbers(guard))),
        "rates": {"bases": guard._rates.bases, "given": guard._rates.given},
        "lanes": lanes,
    }
    group["guard"] = folded(rest)
    guard._randomness.set(draws)  # of which steps that some lanes take to be saved may draw
    try:
        guard.state.update(zip(params, state, strict=True))
        saved = Optimizer.state_dict(guard)
    finally:
        del group["guard"]
        guard.state.update({p: {} for p in params})
    saved["param_groups"] = copy.deepcopy([_plain(one) for one in saved["param_groups"]])
    return saved


def load(guard: "Guard", state_dict: Saved) -> None:
    """Go on from a saved state, of which nothing is loaded if it is refused."""
    check_kind("state_dict", state_dict, dict, "torch.load(path)")
    state_dict = dict(state_dict)
    for hook in guard._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(guard, state_dict) or state_dict
    groups = copy.deepcopy(state_dict.get("param_groups", []))
    rest = unfolded(groups[0].pop("guard", b""), guard._weights.params[0]) if groups else {}
    entries = state_dict.get("state", {}).values()
    if not rest and entries and not any(entries):
        raise ValueError(
            "state_dict must hold what is known of each parameter, got nothing of any (get and set "
            "it without flatten_optimizer_state_dict)"
        )
    if groups and not rest and guard._alike:
        _take_over(guard, state_dict)
        return
    if rest.get("kind") != _kind(guard):
        got = rest.get("kind") or (
            f"one with the keys {list(state_dict)} (an optimizer's own is taken over before the "
            "first step)"
        )
        raise ValueError(f"state_dict must be of a guard with {_kind(guard)}, got {got}")
    state = [state_dict["state"].get(key, {}) for group in groups for key in group["params"]]
    lanes, numbers = guard._lanes, _numbers(guard)
    loads = [
        _unpack(lane, state, rest["lanes"][name], rest["rank"]) for name, lane in lanes.items()
    ]
    leader, *running = (lanes[name] for name in (rest["leader"], *rest["running"]))
    if len(rest["numbers"]) != len(list(leaves(numbers))):
        raise ValueError(
            f"state_dict must have the numbers of a {type(guard).__name__}, got "
            f"{len(rest['numbers'])}"
        )
    numbers = _filled(numbers, iter(rest["numbers"]))
    bases, given = rest["rates"]["bases"], rest["rates"]["given"]

    # From here on nothing may fail.
    for load_lane in loads:
        load_lane()
    guard.go_on(numbers, leader, running)
    for group, entries in zip(guard.param_groups, groups, strict=True):
        group.update({k: v for k, v in entries.items() if k != "params"})
    guard._rates.go_on(bases, given)


def _take_over(guard: "Guard", state_dict: Saved) -> None:
    """Have the live lane go on from an optimizer's own state, with all rates in proportion."""
    before, optimizer = save(guard), guard._leader.optimizer
    groups, rates = optimizer.param_groups, []
    try:
        optimizer.load_state_dict(state_dict)
        for ours, was, now in zip(guard.param_groups, groups, optimizer.param_groups, strict=True):
            if lacking := was.keys() - now.keys():
                raise KeyError(min(lacking))
            if now.get("maximize"):
                raise ValueError("state_dict must be of a run that minimizes, got maximize=True")
            settings = {key: now[key] for key in now.keys() & (SETTINGS - PARAMS)}
            rates.append(settings.pop("lr", None))
            ours.update(settings)
            now.update({"lr": was["lr"]} if "lr" in was else {})
        guard._rates.note()
        for ours, rate in zip(guard.param_groups, rates, strict=True):
            ours.update({} if rate is None else {"lr": float(rate)})
        guard._rates.apply()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        vars(optimizer)["param_groups"] = groups
        load(guard, before)
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"state_dict must be of {named(type(optimizer))}, which goes on with it, or of "
            f"{named(type(guard))}, got one of something else ({error!r})"
        ) from error
    guard._alike = False


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


def _kind(guard: "Guard") -> Saved:
    """What two guards must have in common; of each optimizer how many parameters a group has."""
    optimizers = [
        [type(one).__name__, *(len(group["params"]) for group in one.param_groups)]
        for one in (inner.optimizer for inner in guard._inners.values())
    ]
    lanes = {"lanes": list(guard._lanes), "optimizers": optimizers}
    return {"kind": type(guard).__name__, **lanes, "nt": guard.nt, "nc": guard.nc}


def _numbers(guard: "Guard") -> list[Any]:
    return [getattr(guard, name) for name in guard.remembered]


def _filled(like: Any, numbers: Iterator[Any]) -> Any:
    """Lists and named tuples of this kind, of the next numbers."""
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


def _pack(lane: "Lane", state: list[Saved], within: bool) -> Saved:
    """Of a lane, what is of parameters into ``state``; the rest is returned.

    States of all times have the same tensors, so that any can be loaded in place of a new one.
    """
    params, before = lane.weights.params, lane.before if within else []
    copies = {"value": clones(lane.point), "before": clones(before or lane.point)}
    kept = Memory(_made(lane), []).copy().state
    for k, (p, entries) in enumerate(zip(params, state, strict=True)):
        for name, values in copies.items():
            entries[f"{lane.name}.{name}"] = sharded_as(p, values[k])
        for key, value in kept.pop(p, {}).items():
            if not isinstance(key, str):
                raise ValueError(
                    f"memory of a parameter must have strings as names to be saved, got {key!r}"
                )
            entries[f"{lane.name}.memory.{key}"] = value
    return {
        "before": bool(before),
        "buffers": {name: values[len(params) :] for name, values in copies.items()},
        "blank": all(made == {} for made in lane.memory().state.values()),
        "others": kept,
        "options": list(map(_plain, lane.memory().options)),
        "copies": sorted(lane.inner.copies),
        "settings": list(map(_plain, lane.inner.memory(lane.inner.holder).options)),
        "losses": stacked(lane.losses).tolist(),
        "warm_up": lane.warm_up,
    }


def _unpack(lane: "Lane", state: list[Saved], rest: Saved, rank: int) -> Callable[[], None]:
    """What has the lane be what is saved of it, and can't fail."""
    losses = [scalar(float(loss)) for loss in rest["losses"]]
    values = _values(lane, "value", state, rest["buffers"].get("value", []), rank)
    before = rest["before"] and _values(
        lane, "before", state, rest["buffers"].get("before", []), rank
    )
    kept = {} if rest["blank"] else _memory(lane, state, rest["others"])
    pairs = zip(lane.memory().options, rest["options"], strict=True)
    options = [{k: v for k, v in now.items() if not _is_plain(v)} | then for now, then in pairs]
    memory, settings = Memory(kept, options), rest["settings"]
    copied, warm_up = set(rest["copies"]), int(rest["warm_up"])

    def load_lane() -> None:
        lane.inner.go_on(settings, copied)
        lane.go_on(values, before or [], losses, memory, warm_up)

    return load_lane


def _values(
    lane: "Lane", which: str, state: list[Saved], buffers: list[Tensor], rank: int
) -> "Copy":
    """A copy, in the place, shapes and dtypes of the model."""
    live, params, name, saved = lane.weights.live(), lane.weights.params, f"{lane.name}.{which}", []
    for p, entries, ours in zip(params, state, live, strict=False):
        if name not in entries and p.requires_grad:
            raise ValueError(f"state_dict must hold {name} of each parameter, got one without")
        value = entries.get(name, ours)  # torch.distributed.checkpoint leaves frozen ones out
        check_rank(p, value, rank, "state_dict")
        saved.append(local(value))
    saved += buffers
    shapes = ([list(tensor.shape) for tensor in tensors] for tensors in (live, saved))
    for ours, theirs in zip_longest(*shapes):
        if ours != theirs:
            raise ValueError(
                f"state_dict must be of the same model, with a tensor of shape {ours}, got {theirs}"
            )
    return [s.detach().to(o.device, o.dtype, copy=True) for o, s in zip(live, saved, strict=True)]


def _made(lane: "Lane") -> dict[Any, Any]:
    """The state of its optimizer; before the first step what such a step makes.

    torch.distributed.checkpoint loads only what is there on both sides.
    """
    if state := lane.memory().state or lane.inner.memory(lane.inner.holder).state:
        return state
    weights, previous = lane.weights, lane.inner.memory(lane.inner.holder)
    values = clones(weights.live())
    try:
        for p in weights.params:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        lane.switch("train")
        lane.take_step(0.0)
    finally:
        made = lane.inner.exchange(previous)
        weights.reset_gradients([])
        transfer(weights.live(), values)
    return made.state


def _memory(lane: "Lane", state: list[Saved], others: dict[Any, Any]) -> dict[Any, Any]:
    """Counts stay on the host, where optimizers without ``capturable`` have them."""
    groups, name = lane.optimizer.param_groups, f"{lane.name}.memory."
    on_device = any(group.get("capturable") or group.get("fused") for group in groups)
    of_params = copy.deepcopy(  # at once: what parameters share is shared in the copy
        [
            {key.removeprefix(name): value for key, value in saved.items() if key.startswith(name)}
            for saved in state
        ]
    )
    kept = others | {
        p: made for p, made in zip(lane.weights.params, of_params, strict=True) if made
    }
    if not kept:
        raise ValueError(f"state_dict must hold {name}* of parameters, got none")
    for p, entries in kept.items():
        for key, made in entries.items() if isinstance(p, Tensor) else ():
            moves = on_device or (p.dim() == 0 and key != "step")  # what has no dimension
            for t in leaves(made):
                if isinstance(t, Tensor) and t.device != p.device and (t.dim() or moves):
                    t.data = t.to(p.device)
    return kept
