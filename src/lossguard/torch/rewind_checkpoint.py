"""The state of ``Rewind`` on disk: tensors under the names of parameters, and plain numbers.

Every entry is there from the first step of the optimizer on, whatever has happened, so that
``torch.distributed.checkpoint`` finds each of them in the state that it loads into.
"""

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossguard.torch.packing import check_rank, this_rank
from lossguard.torch.snapshot import Live, Saved

if TYPE_CHECKING:
    from lossguard.torch.rewind import Rewind

OF_RULE = (
    *("calls", "returns", "thrown", "skipped", "unread", "age", "candidate_age", "in_a_row"),
    *("last_return", "ramp", "cap", "pending"),
    *("alarm.start", "alarm.reference", "alarm.score"),
    *("audits.first", "audits.best", "audits.score"),
)
NUMBERS = (*(f"_rule.{name}" for name in OF_RULE), "_one_by_one", "_candidate_audit")
SNAPSHOTS = ("trusted", "candidate")


def save(rewind: "Rewind") -> dict[str, Any]:
    """Both snapshots, and all numbers."""
    kept = rewind._rule.alarm.losses
    losses = torch.zeros(rewind._rule.block, dtype=torch.float64)
    losses[: len(kept)] = torch.tensor(kept, dtype=torch.float64)
    snapshots = {which: getattr(rewind, f"_{which}") for which in SNAPSHOTS}
    begun = {which: bool(one and one["optimizer"]) for which, one in snapshots.items()}
    # In the place of what a snapshot hasn't got, the present state.
    now: Any = None if all(begun.values()) else rewind._live.save(None, offload=False)
    whole = {which: one or now for which, one in snapshots.items()}
    return {
        **{
            which: one if begun[which] else {**one, "optimizer": now["optimizer"]}
            for which, one in whole.items()
        },
        "losses": losses,
        "unread": rewind._losses,
        "rank": this_rank(),
        "numbers": {
            **{name: attrgetter(name)(rewind) for name in NUMBERS},
            "losses": len(kept),
            "begun": [begun[which] for which in SNAPSHOTS],
        },
    }


def load(rewind: "Rewind", state: dict[str, Any]) -> None:
    """The inverse; a model or an optimizer is not touched.

    Raises:
        ValueError: if the state lacks something, or is of another model, ``window`` or ``every``.
    """
    _check(rewind, state)
    numbers = state["numbers"]
    for name in NUMBERS:
        path, _, last = name.rpartition(".")
        setattr(attrgetter(path)(rewind) if path else rewind, last, numbers[name])
    rewind._rule.alarm.losses = state["losses"][: numbers["losses"]].tolist()
    rewind._losses.copy_(state["unread"])
    for which, begun in zip(SNAPSHOTS, numbers["begun"], strict=True):
        setattr(rewind, f"_{which}", _own(rewind._live, state[which], begun, rewind._offload))
    rewind._last = rewind._live.save(None, rewind._offload) if rewind._one_by_one else None


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
    wanted = (*SNAPSHOTS, "losses", "unread", "rank", "numbers")
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
        check_rank(tensor, saved, state["rank"], "state")
