"""What ``Rewind`` does to a training run: copies of its state, the way back, and careful steps."""

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.ranks import check_rank, this_rank
from lossguard.torch.rates import set_rate
from lossguard.torch.tensors import are_finite, zero_unsound

Saved = dict[str, Any]
"""``model.NAME`` and ``optimizer.NAME.KEY`` of each parameter, ``model.NAME`` of each buffer, and
``also``, the states of other objects."""
SOUND = torch.tensor(False)
"""Of a step whose gradients were finite."""
Offload = bool | str | os.PathLike[str]
Place = torch.device | Path | None
"""Where copies go: None, where the originals are."""


class Live:
    """What is copied and set back: parameters, buffers, the optimizer's memory, and others."""

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
            now = self.optimizer.state.pop(param, {})
            for key, value in remembered[name].items():  # none before the first step
                whole = isinstance(value, Tensor) and value.shape == param.shape
                place = param.device if whole else None
                self.optimizer.state[param][key] = copied(value, now.get(key), place)
        for one, its_state in zip(self.also, saved["also"], strict=True):
            one.load_state_dict(copy.deepcopy(its_state))
            if hasattr(one, "get_last_lr"):  # a scheduler, of which the rates are a part
                rates = one.get_last_lr()
                for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                    set_rate(group, float(rate))

    def pack(self, trusted: Saved, candidate: Saved) -> Saved:
        """Two snapshots, of which the second may be empty, for a ``state_dict``.

        Every entry is there from the first step of the optimizer on, whatever has happened, as
        ``torch.distributed.checkpoint`` loads only into entries that are there.
        """
        begun = [any(key.startswith("optimizer.") for key in one) for one in (trusted, candidate)]
        now = {} if all(begun) else self.save()  # in the place of what a snapshot hasn't got
        both = {"trusted": {**now, **trusted}, "candidate": {**now, **candidate}}
        return {**both, "begun": begun, "rank": this_rank()}

    def unpack(self, state: Saved) -> list[Saved]:
        """Copies of what was packed; refuse what is of another model, or another rank's shards."""
        for name, tensor in self.tensors.items():
            saved = state["trusted"].get(f"model.{name}")
            shape = None if saved is None else tuple(saved.shape)
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"state must be of this model, whose {name} has shape {tuple(tensor.shape)}, "
                    f"got {shape}"
                )
            check_rank(tensor, saved, state["rank"], "state")
        snapshots = [self.save(), self.save()]
        for k, which in enumerate(("trusted", "candidate")):
            begun, places = state["begun"][k], snapshots[k]
            snapshots[k] = {
                name: copied(value, places.get(name))
                for name, value in state[which].items()
                if begun or not name.startswith("optimizer.")
            }
        return snapshots


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
        self._rates: list[float | Tensor] = []
        """Those of the groups between steps, while it multiplies them."""
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
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            set_rate(group, rate)
        self._rates = []


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
