"""What ``Rewind`` keeps of a training run: copies of its state, and the way back."""

import copy
import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import innermost
from lossguard.torch.distributed import check_rank, mean_of_ranks, this_rank
from lossguard.torch.rates import beside_state, options_of, set_back
from lossguard.torch.tensors import (
    PLAIN,
    Number,
    are_finite,
    buffers_of,
    finite,
    is_sharded,
    leaves,
    local,
    own_buffers,
    stacked,
)

Saved = dict[str, Any]
"""``model``, parameters and buffers by name; ``optimizer``, the memory of each parameter by name;
of each optimizer ``others``, what it remembers beside, and ``groups``, without parameters;
``also``, the states of other objects."""
PARTS = ("model", "optimizer", "others", "groups", "also")
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
        self.names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        self._shapes = {param: param.shape for param in self.names}
        self._buffers = dict(model.named_buffers())
        _check_rates(optimizers)
        _check_schedulers(also, optimizers)
        sharded = any(hasattr(param, "to_local") for param in self.names)
        self.place = _place_of(offload, sharded=sharded)
        self._finite: dict[str, bool] = {}
        """Of each buffer whether it was when it was first seen: masks of attention aren't."""
        self._numbers = [p for p in self.names if p.requires_grad or are_finite([p])]
        """Parameters that aren't such."""

    def trained(self) -> dict[Tensor, Optimizer]:
        found: dict[Tensor, Optimizer] = {}
        for one in self.optimizers:
            for param in [param for group in one.param_groups for param in group["params"]]:
                if param not in self.names:
                    raise ValueError(
                        "optimizer must train parameters that the model has when Rewind is built, "
                        f"got one of shape {tuple(param.shape)} that it hadn't "
                        "(nn.ModuleList([model, loss]) has those of two)"
                    )
                if found.setdefault(param, one) is not one:
                    raise ValueError(
                        "optimizers must train different parameters, got two that train "
                        f"{self.names[param]}"
                    )
        return found

    def check_parameters(self) -> None:
        for name, param in self.model.named_parameters():
            if self._shapes.get(param) != param.shape:
                raise ValueError(
                    "model must have the parameters that it had when Rewind was built, got another "
                    f"one, or of another shape, {name} (build another Rewind)"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, and the buffers as they are now: a forward pass may put others there."""
        self.check_parameters()
        return {name: param for param, name in self.names.items()} | buffers_of(self.model)

    def are_finite(self) -> tuple[Tensor, Tensor]:
        """Whether parameters and buffers are, as tensors on their device: nothing waits."""
        known = (b for name, b in buffers_of(self.model).items() if self._finite.get(name))
        return are_finite(self._numbers), are_finite(known)

    def memory(self) -> dict[tuple[str, str], Tensor]:
        """What the optimizers remember of each parameter, by its name and their own."""
        return {
            (self.names[param], key): value
            for param, one in self.trained().items()
            for key, value in one.state.get(param, {}).items()
            if (type(value) in PLAIN and not value.is_meta) or is_sharded(value)
        }

    def has_lost(self, since: Saved, group: Any) -> bool:
        """Whether on any rank a memory isn't finite that was so in a snapshot, or wasn't there."""
        found, lost = self.memory(), False
        sound = stacked([are_finite([value]) for value in found.values()]).tolist()
        for name, key in compress(found, [not one for one in sound]):
            before = since["optimizer"].get(name, {}).get(key)
            lost |= before is None or finite(before)
        return mean_of_ranks(torch.tensor(float(lost), device="cpu"), group).item() > 0

    def numbers(self, unread: Sequence[tuple[Number, Number]], *, memory: bool = False) -> Tensor:
        """These two, whether the optimizers' memory is, if asked for, and losses, each with
        whether the gradients of its step weren't finite."""
        third = are_finite(self.memory().values() if memory else ())
        sound = [bool(one) if one.is_cpu else one for one in (*self.are_finite(), third)]
        return stacked([*sound, *chain.from_iterable(unread)])

    @torch.no_grad()
    def refuse_copies(self, since: Saved) -> None:
        """Refuse optimizers whose steps would undo a return, by what has moved since a snapshot."""
        moved: dict[Optimizer, list[Tensor]] = {}
        for param, one in self.trained().items():
            now, then = local(param.detach()), local(since["model"][self.names[param]])
            if now.numel() > 1 and not torch.equal(now, then.to(now.device)):
                moved.setdefault(one, []).append(now)
        for one, values in moved.items():
            _refuse_copies(one, values, self.names)

    @torch.inference_mode(False)
    @torch.no_grad()
    def save(self, old: Saved | None = None) -> Saved:
        """A copy, in the tensors of an ``old`` one as far as they fit."""
        remembered = {
            self.names[param]: one.state[param]
            for param, one in self.trained().items()
            if one.state.get(param)
        }
        others = {str(k): _of_no_parameter(one) for k, one in enumerate(self.optimizers)}
        for name, buffer in buffers_of(self.model).items():
            if name not in self._finite:
                self._finite[name] = bool(are_finite([buffer]))
        now = {"model": self.tensors(), "optimizer": remembered, "others": others}
        now["also"] = [one.state_dict() for one in self.also]
        groups = [[options_of(group) for group in one.param_groups] for one in self.optimizers]
        return {**copied(now, old, self.place), "groups": copy.deepcopy(groups)}

    @torch.no_grad()
    def load_buffers(self, saved: Saved) -> None:
        """Set them back alone, but for those that came later or have grown since."""
        for name, buffer in own_buffers(self.model, self._buffers).items():
            before = saved["model"].get(name)
            if before is not None and before.shape == buffer.shape:
                made_in_validation = torch.inference_mode(buffer.is_inference())
                with made_in_validation, torch.no_grad():
                    buffer.copy_(before, non_blocking=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        self.check_parameters()
        self.load_buffers(saved)
        for param, name in self.names.items():
            param.copy_(saved["model"][name], non_blocking=True)
            if param.grad is not None:  # of where it was: there may be a step before the next one
                param.grad.zero_()
        groups = copy.deepcopy(saved["groups"])
        for k, (one, its_groups) in enumerate(zip(self.optimizers, groups, strict=True)):
            set_back(one.param_groups, its_groups)
            state: Any = one.state
            for key in _of_no_parameter(one):
                del state[key]
            state.update(copied(saved["others"][str(k)]))
        for param, optimizer in self.trained().items():
            now = optimizer.state.pop(param, {})
            before = saved["optimizer"].get(self.names[param], {})  # none before the first step
            for key, value in before.items():
                whole = isinstance(value, Tensor) and value.shape == param.shape
                place = param.device if whole or isinstance(value, list | tuple) else None
                optimizer.state[param][key] = copied(value, now.get(key), place)
        for one, its_state in zip(self.also, saved["also"], strict=True):
            place = copy.deepcopy(one.state_dict())  # on the devices where it has its tensors
            one.load_state_dict(copied(its_state, place))
            if hasattr(one, "get_last_lr"):  # a scheduler, of which what it sets is a part
                for optimizer, its_groups in zip(self.optimizers, groups, strict=True):
                    if _optimizer_of(one) in (None, optimizer):
                        set_back(optimizer.param_groups, its_groups, settings=True)

    def pack(self, trusted: Saved, candidate: Saved) -> Saved:
        """Two snapshots, of which the second may be empty, for a ``state_dict``.

        Every entry is there from the first step of the optimizer on, whatever has happened, as
        ``torch.distributed.checkpoint`` loads only into entries that are there. No tensor is
        in both, or the second's numbers would be loaded into the first as well.
        """
        begun = [bool(one.get("optimizer")) for one in (trusted, candidate)]
        now = {} if all(begun) else self.save()  # in the place of what a snapshot hasn't got
        filled = [
            one if whole else {**now, **one, "optimizer": copied(now["optimizer"])}
            for one, whole in zip((trusted, candidate), begun, strict=True)
        ]
        both = dict(zip(("trusted", "candidate"), filled, strict=True))
        return {**both, "begun": begun, "rank": this_rank()}

    def unpack(self, state: Saved) -> tuple[Saved, Saved]:
        """Copies of what was packed; refuse another model's, or another rank's."""
        snapshots: list[Saved] = []
        kept = {*self.names.values(), *self.model.state_dict()}
        for k, which in enumerate(("trusted", "candidate")):
            whole = {part: state[which][part] for part in PARTS}
            _check_model(whole["model"], self.tensors(), kept, state["rank"])
            memory = whole["optimizer"] if state["begun"][k] else {}
            place = self.save()
            all(map(bool, self.are_finite()))  # waits for copies, which would come later than these
            snapshots.append(copied({**whole, "optimizer": memory}, place))
        trusted, candidate = snapshots
        return trusted, candidate


def _refuse_copies(optimizer: Optimizer, moved: list[Tensor], params: Iterable[Tensor]) -> None:
    """Refuse copies of parameters that have moved, where they would undo what is set back."""
    live = {local(p).data_ptr() for p in params}
    for name, held in beside_state(optimizer).items():
        tensors = [local(leaf).detach() for leaf in leaves(held) if isinstance(leaf, Tensor)]
        copies = [t for t in tensors if t.layout is torch.strided and t.data_ptr() not in live]
        if all(
            any(t.shape == value.shape and torch.equal(t.to(value), value) for t in copies)
            for value in moved
        ):
            raise ValueError(
                "copies of the parameters must be in an optimizer's state, which goes where they "
                f"go, got {type(optimizer).__name__} with some in {name}"
            )


def _check_rates(optimizers: Sequence[Optimizer]) -> None:
    if any(group.get("lr") is None for one in optimizers for group in one.param_groups):
        raise ValueError("optimizer must have a rate, lr, in each of its groups, got one without")


def _check_schedulers(schedulers: Sequence[Any], optimizers: Sequence[Optimizer]) -> None:
    for one in schedulers:
        if _optimizer_of(one) not in (None, *optimizers):
            raise ValueError(
                "schedulers must be of this optimizer, if of any, got one of another, a "
                f"{type(one).__name__}"
            )


def _place_of(offload: Offload, *, sharded: bool) -> Place:
    if isinstance(offload, bool):
        return torch.device("cpu") if offload else None
    if sharded:
        raise ValueError(f"offload must be True or False for shards, got {offload!r}")
    if not Path(offload).is_dir():
        raise ValueError(f"offload must be a folder that is there, got {str(offload)!r}")
    return Path(offload)


def _check_model(
    saved: dict[str, Tensor], live: dict[str, Tensor], kept: set[str], rank: int
) -> None:
    """Refuse what is not of a model with these tensors; those not ``kept`` may be others.

    They are buffers that no model's state has, so a fresh model can't have them in that shape.
    """
    for name, tensor in live.items():
        its = saved.get(name)
        got = "one without" if its is None else f"shape {tuple(its.shape)}"
        if got == f"shape {tuple(tensor.shape)}":
            check_rank(tensor, its, rank, "state")
        elif name in kept:
            raise ValueError(
                f"state must be of this model, with {name} of shape {tuple(tensor.shape)}, got "
                f"{got}"
            )


def _of_no_parameter(optimizer: Optimizer) -> Saved:
    return {key: one for key, one in optimizer.state.items() if not isinstance(key, Tensor)}


def _optimizer_of(scheduler: Any) -> Optimizer | None:
    """The one whose rates it sets, beneath wrappers of both; None: it has none that it tells."""
    inner = getattr(scheduler, "scheduler", scheduler)  # as Accelerate wraps it
    of = getattr(inner, "optimizer", None)
    return innermost(of) if isinstance(of, Optimizer) else None


def copied(value: Any, old: Any = None, place: Place = None) -> Any:
    """A copy, of tensors in those of ``old`` as far as they fit, else in a new place."""
    if isinstance(value, dict):
        places = old if isinstance(old, dict) else {}
        made = copy.copy(value)  # of its kind: a module's state has more than entries
        for key, one in value.items():  # a Counter's ``update`` adds
            made[key] = copied(one, places.get(key), place)
        return made
    if type(value) in (list, tuple):
        fits = isinstance(old, list | tuple) and len(old) == len(value)
        pairs = zip(value, old if fits else [None] * len(value), strict=True)
        return type(value)([copied(one, there, place) for one, there in pairs])
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    strided = value.layout is torch.strided
    if isinstance(old, Tensor) and (old.shape, old.dtype) == (value.shape, value.dtype) and strided:
        return old.copy_(value, non_blocking=True)
    value, device = value.detach(), place or value.device
    if isinstance(device, Path):
        return _on_disk(value, device) if strided else value.to("cpu", copy=True)
    if strided and device.type == "cpu" and value.device.type == "cuda":
        pinned = torch.empty_like(value, device=device, pin_memory=True)
        return pinned.copy_(value, non_blocking=True)
    return value.to(device, copy=True)


def _on_disk(value: Tensor, folder: Path) -> Tensor:
    """A copy in a file that goes with it: nothing of it stays if the process is killed."""
    if not value.numel():
        return value.cpu()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # or a full disk would end the process
            os.posix_fallocate(file.fileno(), 0, value.nbytes)
        else:
            file.truncate(value.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype)
    return mapped.view(value.shape).copy_(value)
