"""The state of ``Rewind`` on disk: tensors under the names of parameters, and plain numbers.

Every entry is there from the first step of the optimizer on, whatever has happened, so that
``torch.distributed.checkpoint`` finds each of them in the state that it loads into.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossguard.torch.ranks import check_rank, this_rank
from lossguard.torch.snapshot import Live, copied

if TYPE_CHECKING:
    from lossguard.torch.rewind import Rewind

SNAPSHOTS = ("trusted", "candidate")


def save(rewind: "Rewind") -> dict[str, Any]:
    """Both snapshots, and all numbers."""
    snapshots = {which: getattr(rewind, f"_{which}") or {} for which in SNAPSHOTS}
    begun = [any(key.startswith("optimizer.") for key in one) for one in snapshots.values()]
    # In the place of what a snapshot hasn't got, the present state.
    now = {} if all(begun) else rewind._live.save()
    return {
        **{which: {**now, **one} for which, one in snapshots.items()},
        "unread": rewind._losses.tolist(),  # waits for copies to the host, too
        "rank": this_rank(),
        "options": _options(rewind),
        "rule": rewind._rule.numbers(),
        "one_by_one": rewind._one_by_one,
        "begun": begun,
    }


def load(rewind: "Rewind", state: dict[str, Any]) -> None:
    """The inverse; a model or an optimizer is not touched.

    Raises:
        ValueError: if the state is of another model, ``window`` or ``every``, or is no such state.
    """
    _check(rewind, state)
    live = rewind._live
    rewind._rule.load(state["rule"])
    rewind._one_by_one = state["one_by_one"]
    rewind._losses.copy_(torch.tensor(state["unread"], dtype=torch.float64))
    for which, begun in zip(SNAPSHOTS, state["begun"], strict=True):
        own = {
            name: _own(live, name, value)
            for name, value in state[which].items()
            if begun or not name.startswith("optimizer.")
        }
        setattr(rewind, f"_{which}", own)
    rewind._last = live.save() if rewind._one_by_one else None


def _own(live: Live, name: str, value: Any) -> Any:
    """A copy where snapshots of this run are kept."""
    of = name.partition(".")[2]
    like = live.tensors.get(of if name.startswith("model.") else of.rpartition(".")[0])
    if like is None or not isinstance(value, Tensor) or like.shape != value.shape:
        return copied(value)
    return copied(value, device=live.host or like.device)


def _check(rewind: "Rewind", state: dict[str, Any]) -> None:
    ours, theirs = _options(rewind), state.get("options")
    if theirs != ours:
        raise ValueError(f"state must be of a Rewind with {ours}, got {theirs}")
    for name, tensor in rewind._live.tensors.items():
        saved = state["trusted"].get(f"model.{name}")
        shape = None if saved is None else tuple(saved.shape)
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"state must be of this model, whose {name} has shape {tuple(tensor.shape)}, "
                f"got {shape}"
            )
        check_rank(tensor, saved, state["rank"], "state")


def _options(rewind: "Rewind") -> dict[str, int]:
    return {"window": rewind._rule.window, "every": rewind.every}
