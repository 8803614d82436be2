"""The state of ``Rewind`` on disk: tensors under the names of parameters, and plain numbers.

Every entry is there from the first step of the optimizer on, whatever has happened, so that
``torch.distributed.checkpoint`` finds each of them in the state that it loads into.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossguard.torch.snapshot import Live, Saved

if TYPE_CHECKING:
    from lossguard.torch.rewind import Rewind

COUNTS = ("calls", "returns", "thrown", "skipped", "unread", "age", "candidate_age")
OF_RULE = (*COUNTS, "in_a_row", "last_return", "ramp", "cap", "pending")
OF_ALARM = ("start", "reference", "score")
OF_AUDITS = ("first", "best", "score")
OF_REWIND = ("_one_by_one", "_candidate_audit")


def state_of(rewind: "Rewind") -> dict[str, Any]:
    """Both snapshots, and all numbers."""
    live, rule = rewind._live, rewind._rule
    parts = _parts(rewind)
    now = live.save(None, offload=False) if not _is_whole(rewind) else None
    losses = torch.zeros(rule.block, dtype=torch.float64)
    kept = rule.alarm.losses
    losses[: len(kept)] = torch.tensor(kept, dtype=torch.float64)
    return {
        "trusted": _whole(rewind._trusted, now),
        "candidate": _whole(rewind._candidate, now),
        "losses": losses,
        "unread": rewind._losses,
        "numbers": {
            **{f"{of}.{name}": getattr(part, name) for of, part, name in parts},
            "alarm.losses": len(kept),
            "trusted.begun": bool(rewind._trusted["optimizer"]),
            "candidate.begun": bool(rewind._candidate and rewind._candidate["optimizer"]),
        },
    }


def load(rewind: "Rewind", state: dict[str, Any]) -> None:
    """The inverse; a model or an optimizer is not touched.

    Raises:
        ValueError: if the state lacks something, or is of another model, ``window`` or ``every``.
    """
    _check(rewind, state)
    numbers = state["numbers"]
    for of, part, name in _parts(rewind):
        setattr(part, name, numbers[f"{of}.{name}"])
    rewind._rule.alarm.losses = state["losses"][: numbers["alarm.losses"]].tolist()
    rewind._losses.copy_(state["unread"])
    rewind._trusted, rewind._candidate = (
        _own(rewind._live, state[which], numbers[f"{which}.begun"], rewind._offload)
        for which in ("trusted", "candidate")
    )
    rewind._last = rewind._live.save(None, rewind._offload) if rewind._one_by_one else None


def _parts(rewind: "Rewind") -> list[tuple[str, Any, str]]:
    """Each number that there is: of which part, the part itself, and its name there."""
    rule = rewind._rule
    return [
        *(("rule", rule, name) for name in OF_RULE),
        *(("alarm", rule.alarm, name) for name in OF_ALARM),
        *(("audits", rule.audits, name) for name in OF_AUDITS),
        *(("rewind", rewind, name) for name in OF_REWIND),
    ]


def _is_whole(rewind: "Rewind") -> bool:
    return all(saved and saved["optimizer"] for saved in (rewind._trusted, rewind._candidate))


def _whole(saved: Saved | None, now: Saved | None) -> Saved:
    """A snapshot, with the present state in the place of what it hasn't got."""
    if now is None or saved is None:
        return saved or now or {}
    return saved if saved["optimizer"] else {**saved, "optimizer": now["optimizer"]}


def _own(live: Live, saved: Saved, begun: bool, offload: bool) -> Saved:
    """A copy where snapshots of this run are kept."""

    def copied(value: Any, like: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        moves = not offload and value.shape == like.shape
        return value.detach().to(like.device, copy=True) if moves else value.detach().clone()

    params = {name: param for param, name in live.names.items()}
    return {
        "model": {name: copied(saved["model"][name], like) for name, like in live.tensors.items()},
        "optimizer": {
            name: {key: copied(value, params[name]) for key, value in entries.items()}
            for name, entries in saved["optimizer"].items()
            if begun
        },
        "also": saved["also"],
    }


def _check(rewind: "Rewind", state: dict[str, Any]) -> None:
    wanted = ("trusted", "candidate", "losses", "unread", "numbers")
    missing = [key for key in wanted if key not in state]
    if missing:
        raise ValueError(f"state must be of Rewind.state_dict(), but it lacks {missing[0]!r}")
    for key, size, option in (
        ("losses", rewind._rule.block, f"window = {rewind._rule.window}"),
        ("unread", rewind.every, f"every = {rewind.every}"),
    ):
        if len(state[key]) != size:
            raise ValueError(
                f"state must be of a Rewind with {option}, got {len(state[key])} {key}, not {size}"
            )
    for name, tensor in rewind._live.tensors.items():
        saved = state["trusted"]["model"].get(name)
        if saved is None or saved.shape != tensor.shape:
            found = "none" if saved is None else f"shape {tuple(saved.shape)}"
            raise ValueError(
                f"state must be of this model, whose {name} has shape {tuple(tensor.shape)}, "
                f"got {found}"
            )
