"""What a guard's ``state_dict`` holds of its lanes: plain containers, numbers and tensors.

names                y, z or s, for each lane
lanes                per lane: copy, train, check, lost, before, memory, scaler
on_own, excess       of the hedge
aside                x, while the model holds s instead
best                 of a ratchet: copy, memory, losses, cycles, kept, held, anew, begun
"""

from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from lossguard.torch.inner import Inner, Memory
from lossguard.torch.lane import Lane
from lossguard.torch.lanes import Lanes
from lossguard.torch.ratchet import Best
from lossguard.torch.tensors import clone
from lossguard.torch.track_record import Excess

NUMBERS = ("cycles", "kept", "held", "anew", "begun")
"""Of a ratchet's best."""


def save_lanes(lanes: Lanes, phase: int) -> dict[str, Any]:
    """A copy of them, after ``phase`` minibatches of a cycle."""
    return {
        "names": lanes.names,
        "lanes": [save_lane(lane, phase) for lane in lanes.all],
        "on_own": lanes.on_own,
        "excess": list(lanes.excess),
        "aside": clone(lanes.aside),
        "best": None if lanes.best is None else _save_best(lanes.best, lanes.fallback),
    }


def load_lanes(lanes: Lanes, saved: dict[str, Any]) -> None:
    """Put a copy of ``saved`` into lanes that were built in the same way."""
    for lane, its_state in zip(lanes.all, saved["lanes"], strict=True):
        load_lane(lane, its_state)
    lanes.on_own, lanes.excess = saved["on_own"], Excess(*saved["excess"])
    lanes.aside = None
    if saved["aside"] is not None:
        x = clone(lanes.all[-1].copy)  # of its type, and where it is
        _write(saved["aside"], x)
        lanes.aside = x
    if lanes.best is not None:
        _load_best(lanes.best, lanes.fallback, saved["best"])


def check_lanes(lanes: Lanes, saved: dict[str, Any]) -> None:
    """Refuse what was saved of lanes that were built in another way."""
    names = lanes.names
    if saved["names"] != names:
        raise ValueError(
            f"state_dict must have the lanes {', '.join(names)}, got {', '.join(saved['names'])} "
            "(learned and hedge must be as they were)"
        )
    with_ratchet = {True: "with a ratchet", False: "without a ratchet"}
    ours, theirs = lanes.best is not None, saved["best"] is not None
    if ours != theirs:
        raise ValueError(
            f"state_dict must be of a guard {with_ratchet[ours]}, got one of a guard "
            f"{with_ratchet[theirs]}"
        )


def save_lane(lane: Lane, phase: int) -> dict[str, Any]:
    """A copy of one, after ``phase`` minibatches of a cycle."""
    starts_from_x = phase == 0 and not lane.own_path
    return {
        "copy": None if starts_from_x else clone(lane.copy),
        "train": clone(lane.train) if phase else [],
        "check": clone(lane.check) if phase else [],
        "lost": lane.lost,
        "before": _save_memory(lane.inner, lane.before if phase else None),
        "memory": _save_memory(lane.inner, lane.memory),
        "scaler": None if lane.scaler is None else lane.scaler.state_dict(),
    }


def load_lane(lane: Lane, saved: dict[str, Any]) -> None:
    """Put a copy of ``saved`` into it."""
    lane.train, lane.check = clone(saved["train"]), clone(saved["check"])
    lane.lost = saved["lost"]
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
    return None if saved is None else inner.memory_in(saved)


def _write(source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for value, tensor in zip(source, target, strict=True):
            tensor.copy_(value)
