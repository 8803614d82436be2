"""What ``Rewind`` does to a training run: copies of its state, the way back, and careful steps.

On disk they are tensors under the names of parameters, and plain numbers. Every entry is there from
the first step of the optimizer on, whatever has happened, so that ``torch.distributed.checkpoint``
finds each of them in the state that it loads into.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import told_if_damaged
from lossguard.torch.ranks import check_rank, this_rank
from lossguard.torch.rates import set_rate
from lossguard.torch.tensors import are_finite, zero_unsound

if TYPE_CHECKING:
    from lossguard.torch.rewind import Rewind

Saved = dict[str, Any]
"""``model.NAME`` and ``optimizer.NAME.KEY`` of each parameter, ``model.NAME`` of each buffer, and
``also``, the states of other objects."""
SOUND = torch.tensor(False)
"""Of a step whose gradients were finite."""
SNAPSHOTS = ("trusted", "candidate")
Offload = bool | str | os.PathLike[str]
Place = torch.device | Path | None
"""Where copies go: None, where the originals are."""


class Live:
    """What is copied and set back: parameters, buffers, what the optimizer remembers, and others.

    Args:
        model: its parameters and buffers.
        optimizer: of these parameters. Rates and other settings aren't copied.
        also: objects with ``state_dict`` and ``load_state_dict`` that go back too.
        offload: keep copies in the host's memory, or in files of a folder.

    Raises:
        ValueError: if the optimizer has a parameter that the model doesn't have, or no rate; or a
            folder is to keep shards.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, also: Sequence[Any], offload: Offload
    ) -> None:
        self.optimizer, self.also = optimizer, also
        self.place: Place = torch.device("cpu") if offload else None
        self.names = {param: name for name, param in model.named_parameters()}
        if not isinstance(offload, bool):
            self.place = Path(offload)
            if any(hasattr(param, "to_local") for param in self.names):
                raise ValueError(f"offload must be True or False for shards, got {offload!r}")
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for group in optimizer.param_groups:
            if group.get("lr") is None:
                raise ValueError(
                    "optimizer must have a rate, lr, in each of its groups, got one without"
                )
            for param in group["params"]:
                if param not in self.names:
                    raise ValueError(
                        "optimizer must train parameters of the model, got one of shape "
                        f"{tuple(param.shape)} that model.named_parameters() doesn't have"
                    )
        # Buffers may be infinite by design, such as masks of attention.
        finite = [name for name, buffer in model.named_buffers() if bool(are_finite([buffer]))]
        self._checked = [*self.names.values(), *finite]

    def is_finite(self) -> Tensor:
        """Whether the model is, as a tensor on its device: nothing waits for it."""
        return are_finite(self.tensors[name] for name in self._checked)

    @torch.no_grad()
    def save(self, old: Saved | None = None) -> Saved:
        """A copy, in the tensors of an ``old`` one as far as they fit."""
        old, now = old or {}, {f"model.{name}": tensor for name, tensor in self.tensors.items()}
        for param, name in self.names.items():
            remembered = self.optimizer.state.get(param, {})
            now |= {f"optimizer.{name}.{key}": value for key, value in remembered.items()}
        saved = {name: copied(value, old.get(name), self.place) for name, value in now.items()}
        return {**saved, "also": [copy.deepcopy(one.state_dict()) for one in self.also]}

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        """Set all of it back, in place."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[f"model.{name}"], non_blocking=True)
        remembered: dict[str, dict[str, Any]] = {name: {} for name in self.names.values()}
        for name, value in saved.items():
            if name.startswith("optimizer."):
                of, _, key = name.removeprefix("optimizer.").rpartition(".")
                remembered[of][key] = value
        for param, name in self.names.items():
            if not remembered[name]:
                self.optimizer.state.pop(param, None)  # before the first step: it begins by itself
                continue
            now = self.optimizer.state[param]
            for key in now.keys() - remembered[name].keys():
                del now[key]
            for key, value in remembered[name].items():
                whole = isinstance(value, Tensor) and value.shape == param.shape
                now[key] = copied(value, now.get(key), param.device if whole else None)
        for one, its_state in zip(self.also, saved["also"], strict=True):
            one.load_state_dict(copy.deepcopy(its_state))
            if hasattr(one, "get_last_lr"):  # a scheduler, of which the rates are a part
                rates = one.get_last_lr()
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    set_rate(group, float(rate))


class CarefulSteps:
    """Hooks of an optimizer: rates times ``scale()`` during a step, and no unsound gradients.

    Between steps the rates are those that the user and the schedulers set, so that schedulers of
    every kind go on from their own numbers.

    Attributes:
        broken: whether the last step's gradients weren't finite, as a tensor on their device.
    """

    def __init__(self, optimizer: Optimizer, scale: Callable[[], float]) -> None:
        self.broken = SOUND
        self._scale = scale
        self._rates: list[float | Tensor] | None = None
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._after(optimizer)  # if the last step raised an error half-way
        self.broken = zero_unsound(p for group in optimizer.param_groups for p in group["params"])
        scale = self._scale()
        if scale != 1:
            rates = [group["lr"] for group in optimizer.param_groups]
            self._rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                set_rate(group, rate * scale)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if self._rates is not None:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                set_rate(group, rate)
            self._rates = None


def copied(value: Any, old: Any = None, place: Place = None) -> Any:
    """A copy, in ``old`` if that is such a tensor, else in a new place."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if isinstance(old, Tensor) and old.shape == value.shape and old.dtype == value.dtype:
        return old.copy_(value, non_blocking=True)
    value, device = value.detach(), place or value.device
    if isinstance(device, Path):
        return _on_disk(value, device)
    if device.type == "cpu" and value.device.type == "cuda":
        pinned = torch.empty_like(value, device=device, pin_memory=True)
        return pinned.copy_(value, non_blocking=True)
    return value.to(device, copy=True)


def _on_disk(value: Tensor, folder: Path) -> Tensor:
    """A copy in a file that goes with it: nothing of it stays if the process is killed."""
    if not value.numel():
        return value.cpu()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(value.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype)
    return mapped.view(value.shape).copy_(value)


def save(rewind: "Rewind") -> dict[str, Any]:
    """Both snapshots of a ``Rewind``, and all its numbers."""
    snapshots = {which: getattr(rewind, f"_{which}") or {} for which in SNAPSHOTS}
    begun = [any(key.startswith("optimizer.") for key in one) for one in snapshots.values()]
    # In the place of what a snapshot hasn't got, the present state.
    now = {} if all(begun) else rewind._live.save()
    return {
        **{which: {**now, **one} for which, one in snapshots.items()},
        "unread": rewind._numbers().tolist()[1:],  # waits for copies to the host, too
        "rank": this_rank(),
        "options": _options(rewind),
        "rule": rewind._rule.numbers(),
        "one_by_one": rewind._one_by_one,
        "begun": begun,
    }


def load(rewind: "Rewind", state: dict[str, Any]) -> None:
    """The inverse; a model or an optimizer is not touched.

    Raises:
        ValueError: if the state is of another model, ``window`` or ``every``, or is no such state,
            or damaged. The other one is as it was before, then.
    """
    with told_if_damaged("state"):
        _check(rewind, state)
        live, snapshots = rewind._live, {}
        for k, which in enumerate(SNAPSHOTS):
            places, begun = live.save(), state["begun"][k]
            snapshots[which] = {
                name: copied(value, places.get(name))
                for name, value in state[which].items()
                if begun or not name.startswith("optimizer.")
            }
        losses = [torch.tensor(loss, dtype=torch.float64) for loss in state["unread"]]
        one_by_one = state["one_by_one"]
        rewind._rule.load(state["rule"])  # whole or not at all
    rewind._trusted, rewind._candidate = snapshots.values()
    rewind._unread = [(loss, SOUND) for loss in losses]
    rewind._one_by_one = one_by_one
    rewind._last = live.save() if one_by_one else None


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
