"""What a guard's ``state_dict`` holds: plain containers, numbers and tensors.

state, param_groups    the fallback's, as for any optimizer
learned                the ``state_dict`` of each learned optimizer
guard                  all the rest:
  nt, looks            with which a cycle under way goes on
  phase, gradients, kept, on_own, excess, probes, history, random
  x                    the kept iterate, parameters and buffers
  names                y, z or s, for each lane
  lanes                per lane: copy, train, check, before, memory, scaler, own
  best                 of a ratchet: copy, memory, losses, cycles, kept, held, anew, begun
  schedulers           the ``state_dict`` of each
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import GradScaler

from lossguard.torch.decision import Decision
from lossguard.torch.inner import Inner, Memory, clone
from lossguard.torch.lane import Lane
from lossguard.torch.probing import ProbingState
from lossguard.torch.ratchet import Best
from lossguard.torch.track_record import Excess

if TYPE_CHECKING:
    from lossguard.torch.guard import LossGuard

NUMBERS = ("cycles", "kept", "held", "anew", "begun")
"""Of a ratchet's best."""


def save(guard: LossGuard) -> dict[str, Any]:
    """A copy of the guard's whole state."""
    for pre_hook in guard._optimizer_state_dict_pre_hooks.values():
        pre_hook(guard)
    lanes, cycle = guard._lanes, guard._cycle
    saved = {
        **lanes.fallback.state_dict(),
        "learned": [inner.state_dict() for inner in lanes.learned],
        "guard": {
            "nt": guard.nt,
            "looks": list(guard._looks),
            "phase": cycle.phase,
            "gradients": cycle.gradients,
            "kept": guard._kept,
            "on_own": lanes.on_own,
            "excess": list(lanes.excess),
            "probes": list(guard._probes),
            "history": [decision._asdict() for decision in guard.history],
            "random": cycle.randomness.state(),
            "x": guard._weights.copy(),
            "names": lanes.names,
            "lanes": [_save_lane(lane, cycle.phase) for lane in lanes.all],
            "best": None if lanes.best is None else _save_best(lanes.best, lanes.fallback),
            "schedulers": [clone(scheduler.state_dict()) for scheduler in guard.schedulers],
        },
    }
    for post_hook in guard._optimizer_state_dict_post_hooks.values():
        saved = post_hook(guard, saved) or saved
    return saved


def load(guard: LossGuard, saved: dict[str, Any]) -> None:
    """Put a copy of ``saved`` into a guard that was built in the same way."""
    saved = dict(saved)
    for pre_hook in guard._optimizer_load_state_dict_pre_hooks.values():
        saved = pre_hook(guard, saved) or saved
    state = _checked(guard, saved)
    lanes, cycle = guard._lanes, guard._cycle
    fallback = {key: value for key, value in saved.items() if key not in ("learned", "guard")}
    lanes.fallback.load_state_dict(fallback)
    for inner, its_state in zip(lanes.learned, saved["learned"], strict=True):
        inner.load_state_dict(its_state)
    for scheduler, its_state in zip(guard.schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(clone(its_state))
    for lane, its_state in zip(lanes.all, state["lanes"], strict=True):
        _load_lane(lane, its_state)
    if lanes.best is not None:
        _load_best(lanes.best, lanes.fallback, state["best"])
    cycle.phase = state["phase"]
    cycle.gradients = state["gradients"]
    lanes.on_own, lanes.excess = state["on_own"], Excess(*state["excess"])
    guard._kept = state["kept"]
    guard._probes = ProbingState(*state["probes"])
    guard.history = [Decision(**clone(decision)) for decision in state["history"]]
    guard._weights.read(state["x"])
    cycle.placing.begin()
    cycle.randomness.set(state["random"])
    for post_hook in guard._optimizer_load_state_dict_post_hooks.values():
        post_hook(guard)


def _checked(guard: LossGuard, saved: dict[str, Any]) -> dict[str, Any]:
    state = guard._check_saved(saved, "names")
    names = guard._lanes.names
    if state["names"] != names:
        raise ValueError(
            f"state_dict must have the lanes {', '.join(names)}, got {', '.join(state['names'])} "
            "(learned and hedge must be as they were)"
        )
    with_ratchet = {True: "with a ratchet", False: "without a ratchet"}
    ours, theirs = guard._lanes.best is not None, state["best"] is not None
    if ours != theirs:
        raise ValueError(
            f"state_dict must be of a guard {with_ratchet[ours]}, got one of a guard "
            f"{with_ratchet[theirs]}"
        )
    looks = list(guard._looks)
    if state["phase"] and (state["nt"], state["looks"]) != (guard.nt, looks):
        raise ValueError(
            f"state_dict from within a cycle must have nt={guard.nt} and checks after {looks}, got "
            f"nt={state['nt']} and {state['looks']}"
        )
    return state


def _save_lane(lane: Lane, phase: int) -> dict[str, Any]:
    starts_from_x = phase == 0 and not lane.own_path
    return {
        "copy": None if starts_from_x else clone(lane.copy),
        "train": torch.stack(lane.train).clone() if phase and lane.train else None,
        "check": torch.stack(lane.check).clone() if phase and lane.check else None,
        "before": _save_memory(lane.inner, lane.before if phase else None),
        "memory": _save_memory(lane.inner, lane.memory),
        "scaler": None if lane.scaler is None else lane.scaler.state_dict(),
        "own": sorted(lane.inner.own),
    }


def _load_lane(lane: Lane, saved: dict[str, Any]) -> None:
    lane.inner.own |= set(saved["own"])
    lane.train = [] if saved["train"] is None else list(clone(saved["train"]))
    lane.check = [] if saved["check"] is None else list(clone(saved["check"]))
    lane.before = _load_memory(lane.inner, saved["before"])
    lane.memory = _load_memory(lane.inner, saved["memory"])
    if saved["copy"] is not None:
        _write(saved["copy"], lane.copy)
    if isinstance(lane.scaler, GradScaler) and saved["scaler"]:
        lane.scaler.load_state_dict(clone(saved["scaler"]))


def _save_best(best: Best, fallback: Inner) -> dict[str, Any]:
    return {
        "copy": clone(best.copy),
        "memory": _save_memory(fallback, best.memory),
        "losses": clone(best.losses),
        **{name: getattr(best, name) for name in NUMBERS},
    }


def _load_best(best: Best, fallback: Inner, saved: dict[str, Any]) -> None:
    _write(saved["copy"], best.copy)
    best.memory = _load_memory(fallback, saved["memory"])
    best.losses = clone(saved["losses"])
    for name in NUMBERS:
        setattr(best, name, saved[name])


def _save_memory(inner: Inner, memory: Memory | None) -> dict[str, Any] | None:
    return None if memory is None else inner.state_dict(memory)


def _load_memory(inner: Inner, saved: dict[str, Any] | None) -> Memory | None:
    """The memory in ``saved``, read by way of the optimizer, which then has its own back."""
    if saved is None:
        return None
    current = inner.remember()
    inner.load_state_dict(saved)
    memory = inner.remember()
    inner.exchange(current)
    return memory


def _write(source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for value, tensor in zip(source, target, strict=True):
            tensor.copy_(value)
