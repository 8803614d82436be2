"""What ``Rewind`` does to a training run: copies of its state, the way back, and careful steps."""

import copy
import math
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import innermost
from lossguard.torch.ranks import check_rank, this_rank
from lossguard.torch.rates import options_of, same, set_rate
from lossguard.torch.tensors import are_finite, is_expanded, stacked, zero_unsound
from lossguard.validation import check_kind

Saved = dict[str, Any]
"""``model``, parameters and buffers by name; ``optimizer``, its memory of each parameter by name;
``groups``, its settings; ``also``, the states of other objects."""
SOUND = torch.tensor(False)
"""Of a step whose gradients were finite."""
JUDGED = 16
"""Calls between two looks at whether there was a step for each."""
Offload = bool | str | os.PathLike[str]
Place = torch.device | Path | None
"""Where copies go: None, where the originals are."""


class Live:
    """What is copied and set back: parameters, buffers, the optimizer's memory, and others."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        also: Sequence[Any],
        offload: Offload,
    ) -> None:
        self.model, self.optimizers, self.also = model, optimizers, also
        self.place: Place = torch.device("cpu") if offload else None
        self.names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        if not isinstance(offload, bool | str | os.PathLike):
            raise ValueError(f"offload must be True, False or a folder, got {offload!r}")
        check_kind("schedulers", also, Sequence, "[scheduler]")
        for one in also:
            of = _optimizer_of(one)
            if not callable(getattr(one, "state_dict", None)) or of not in (None, *optimizers):
                raise ValueError(
                    "schedulers must each have a state_dict, and be of this optimizer if of any, "
                    f"got a {type(one).__name__}"
                )
            if of is None and hasattr(one, "get_last_lr") and len(optimizers) > 1:
                raise ValueError(
                    "schedulers must have an optimizer where there are several, got a "
                    f"{type(one).__name__} without"
                )
        if not isinstance(offload, bool):
            self.place = Path(offload)
            if any(hasattr(param, "to_local") for param in self.names):
                raise ValueError(f"offload must be True or False for shards, got {offload!r}")
            if not self.place.is_dir():
                raise ValueError(f"offload must be a folder that is there, got {str(offload)!r}")
        self.own: set[str] = set()
        """What the optimizers' own steps change in their groups, which goes back as well."""
        for group in self.groups():
            if group.get("lr") is None:
                raise ValueError(
                    "optimizer must have a rate, lr, in each of its groups, got one without"
                )
        self.trained()
        # Buffers may be infinite by design, such as masks of attention.
        self._infinite = {n for n, b in model.named_buffers() if not bool(are_finite([b]))}

    def groups(self) -> list[Saved]:
        """The parameter groups of all optimizers."""
        return [group for one in self.optimizers for group in one.param_groups]

    def trained(self) -> dict[Tensor, Optimizer]:
        """Each parameter that is trained, and by which optimizer."""
        found: dict[Tensor, Optimizer] = {}
        for one in self.optimizers:
            for param in [param for group in one.param_groups for param in group["params"]]:
                if param not in self.names:
                    raise ValueError(
                        "optimizer must train parameters that the model has when Rewind is built, "
                        f"got one of shape {tuple(param.shape)} that it hadn't"
                    )
                if found.setdefault(param, one) is not one:
                    raise ValueError(
                        "optimizers must train different parameters, got two that train "
                        f"{self.names[param]}"
                    )
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, and the buffers as they are now: a forward pass may put others there."""
        buffers = {n: b for n, b in self.model.named_buffers() if not is_expanded(b)}
        return dict(self.model.named_parameters()) | buffers

    def are_finite(self) -> tuple[Tensor, Tensor]:
        """Whether parameters and buffers are, as tensors on their device: nothing waits."""
        parameters = dict(self.model.named_parameters())
        buffers = {n: t for n, t in self.tensors().items() if n not in parameters}
        known = (t for name, t in buffers.items() if name not in self._infinite)
        return are_finite(parameters.values()), are_finite(known)

    def numbers(self, unread: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """These two, and losses: NaN where the gradients of their steps weren't finite."""
        finite = self.are_finite()
        broken = stacked([*map(torch.zeros_like, finite), *(flag for _, flag in unread)])
        numbers = stacked([*finite, *(loss for loss, _ in unread)])
        return numbers.masked_fill(broken > 0, math.nan)

    @torch.no_grad()
    def evaluated(self, audit: Callable[[], Any]) -> Any:
        """What it returns; the model's modes of training stay."""
        modes = {module: module.training for module in self.model.modules()}
        try:
            return audit()
        finally:
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def save(self, old: Saved | None = None) -> Saved:
        """A copy, in the tensors of an ``old`` one as far as they fit."""
        remembered = {
            self.names[param]: one.state[param]
            for param, one in self.trained().items()
            if one.state.get(param)
        }
        now = {"model": self.tensors(), "optimizer": remembered}
        return {
            **copied(now, old, self.place),
            "groups": copy.deepcopy([options_of(group) for group in self.groups()]),
            "also": [copy.deepcopy(one.state_dict()) for one in self.also],
        }

    @torch.no_grad()
    def load_buffers(self, saved: Saved) -> None:
        """Set them back alone."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in self.tensors().items():
            if name in saved["model"] and name not in parameters:
                tensor.copy_(saved["model"][name], non_blocking=True)

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        """Set all of it back, in place."""
        self.load_buffers(saved)  # all but those that came later
        for param, name in self.names.items():
            param.copy_(saved["model"][name], non_blocking=True)
        for group, options in zip(self.groups(), saved["groups"], strict=True):
            for key in self.own:
                group.pop(key, None)  # a step makes it
                if key in options:
                    group[key] = copy.deepcopy(options[key])
        for param, optimizer in self.trained().items():
            now = optimizer.state.pop(param, {})
            before = saved["optimizer"].get(self.names[param], {})  # none before the first step
            for key, value in before.items():
                whole = isinstance(value, Tensor) and value.shape == param.shape
                place = param.device if whole else None
                optimizer.state[param][key] = copied(value, now.get(key), place)
        for one, its_state in zip(self.also, saved["also"], strict=True):
            one.load_state_dict(copy.deepcopy(its_state))
            if hasattr(one, "get_last_lr"):  # a scheduler, of which the rates are a part
                optimizer, rates = _optimizer_of(one) or self.optimizers[0], one.get_last_lr()
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    set_rate(group, float(rate))

    def pack(self, trusted: Saved, candidate: Saved) -> Saved:
        """Two snapshots, of which the second may be empty, for a ``state_dict``.

        Every entry is there from the first step of the optimizer on, whatever has happened, as
        ``torch.distributed.checkpoint`` loads only into entries that are there.
        """
        begun = [bool(one.get("optimizer")) for one in (trusted, candidate)]
        now = {} if all(begun) else self.save()  # in the place of what a snapshot hasn't got
        filled = [
            one if whole else {**now, **one, "optimizer": now["optimizer"]}
            for one, whole in zip((trusted, candidate), begun, strict=True)
        ]
        both = dict(zip(("trusted", "candidate"), filled, strict=True))
        return {**both, "begun": begun, "own": " ".join(sorted(self.own)), "rank": this_rank()}

    def unpack(self, state: Saved) -> tuple[Saved, Saved, set[str]]:
        """Copies of what was packed, and ``own``; refuse another model's, or another rank's."""
        snapshots: list[Saved] = []
        for k, which in enumerate(("trusted", "candidate")):
            whole = {part: state[which][part] for part in ("model", "optimizer", "groups", "also")}
            for name, tensor in self.tensors().items():
                saved = whole["model"].get(name)
                got = "one without" if saved is None else f"shape {tuple(saved.shape)}"
                if got != f"shape {tuple(tensor.shape)}":
                    raise ValueError(
                        f"state must be of this model, with {name} of shape "
                        f"{tuple(tensor.shape)}, got {got}"
                    )
                check_rank(tensor, saved, state["rank"], "state")
            counts = len(self.also), len(whole["also"])
            if counts[0] != counts[1]:
                raise ValueError("state must have {} schedulers, got {}".format(*counts))
            memory = whole["optimizer"] if state["begun"][k] else {}
            snapshots.append(copied({**whole, "optimizer": memory}, self.save()))
        trusted, candidate = snapshots
        return trusted, candidate, set(state["own"].split())


def _optimizer_of(scheduler: Any) -> Optimizer | None:
    """The one whose rates it sets, beneath wrappers of both; None: it has none that it tells."""
    inner = getattr(scheduler, "scheduler", scheduler)  # as Accelerate wraps it
    of = getattr(inner, "optimizer", None)
    return innermost(of) if isinstance(of, Optimizer) else None


class CarefulSteps:
    """Hooks of optimizers: rates times ``rewind.scale`` in a step, and no unsound gradients.

    Between steps the rates are those that the user and the schedulers set, so that schedulers of
    every kind go on from their own numbers. Once nobody has the ``Rewind`` any more they are gone.

    Attributes:
        broken: whether gradients weren't finite since it was read, as a tensor on their device.
        closed: whether they are gone.

    Every ``JUDGED`` calls of ``take`` it warns, once, if there have been about as few steps as
    none, or several for each; or if there is no call at all.
    """

    def __init__(self, optimizers: Sequence[Optimizer], rewind: Any, own: set[str]) -> None:
        for hook in [h for one in optimizers for h in one._optimizer_step_pre_hooks.values()]:
            if isinstance(other := getattr(hook, "__self__", None), CarefulSteps):
                other.remove()  # or both would multiply the rates
        self.broken, self.closed, self._begun = SOUND, False, False
        self._calls, self._steps = 0, dict.fromkeys(map(id, optimizers), 0)
        self._rewind, self._own = weakref.ref(rewind), own
        self._groups: list[Saved] = []
        """Of the optimizer whose step is under way."""
        self._options: list[Saved] = []
        """Their settings when it began."""
        self._rates: list[float | Tensor] = []
        """Their rates between steps, while it multiplies them."""
        self._hooks = [
            hook
            for one in optimizers
            for hook in (
                one.register_step_pre_hook(self._before),
                one.register_step_post_hook(self._after),
            )
        ]

    def take(self) -> Tensor:
        """``broken``, which is read."""
        if self.closed:
            raise ValueError("Rewind must be open, got one that close() or another one has closed")
        self._calls += 1
        if self._calls == JUDGED:
            self._judge()
        broken, self.broken = self.broken, SOUND
        return broken

    def _judge(self) -> None:
        steps = self._steps.values()
        if 2 * max(steps) <= self._calls or min(steps) >= 2 * self._calls:
            given = f"{self._calls} calls for {max(steps)} steps"
            warnings.warn(
                f"Rewind.observe must be called once after each optimizer step, got {given}",
                RuntimeWarning,
                stacklevel=4,
            )
            self._calls = JUDGED  # no more of it
        else:
            self._calls, self._steps = 0, dict.fromkeys(self._steps, 0)

    def remove(self) -> None:
        """Leave the optimizers as they were."""
        self.closed = True
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: Saved) -> tuple | None:
        self._after()  # if the last step raised an error half-way
        rewind = self._rewind()
        if rewind is None:
            self.remove()
            return None
        if not self._begun:
            self._begun = True
            rewind.begin()
        self._steps[id(optimizer)] += 1
        if self._calls == 0 and min(self._steps.values()) == JUDGED * JUDGED:
            self._judge()
        changed, (itself, *given) = None, args
        closure: Any = kwargs.get("closure", given[0] if given else None)

        def sound() -> Any:
            loss = closure()
            self._look(optimizer)
            return loss

        if not callable(closure):
            self._look(optimizer)
        elif "closure" in kwargs:
            changed = args, {**kwargs, "closure": sound}
        else:
            changed = (itself, sound, *given[1:]), kwargs
        scale, self._groups = rewind.scale, optimizer.param_groups
        if scale != 1:
            rates = [group["lr"] for group in self._groups]
            self._rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
            for group, rate in zip(self._groups, rates, strict=True):
                set_rate(group, rate * scale)
        self._options = [dict(group) for group in self._groups]
        return changed

    def _look(self, optimizer: Optimizer) -> None:
        """Make gradients 0 that aren't finite; those that a scaler has found it leaves out."""
        if getattr(optimizer, "found_inf", None) is None:
            params = (p for group in optimizer.param_groups for p in group["params"])
            broken, before = zero_unsound(params), self.broken
            self.broken = (
                broken if before is SOUND else (before.to(broken.device) > 0) | (broken > 0)
            )

    def _after(self, *_: Any) -> None:
        for group, before in zip(self._groups, self._options, strict=False):
            others = [key for key, value in group.items() if value is not before.get(key)]
            changed = {key for key in others if not same(before.get(key), group[key])}
            self._own |= changed - {"lr", "params"}
        for group, rate in zip(self._groups, self._rates, strict=False):
            set_rate(group, rate)
        self._groups, self._rates, self._options = [], [], []


def copied(value: Any, old: Any = None, place: Place = None) -> Any:
    """A copy, of tensors in those of ``old`` as far as they fit, else in a new place."""
    if isinstance(value, dict):
        places = old if isinstance(old, dict) else {}
        return {key: copied(one, places.get(key), place) for key, one in value.items()}
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
