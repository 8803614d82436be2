"""What ``Rewind`` keeps of a training run: copies of its state at several ages."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import innermost
from lossguard.torch.distributed import check_rank, this_rank
from lossguard.torch.rates import options_of, set_back, written
from lossguard.torch.tensors import PLAIN, are_finite, buffers_of, is_sharded, own_buffers

EVERY = 64
"""Steps between two copies."""
Content = dict[str, Any]
"""``model``, trained parameters and buffers by name; ``optimizer``, the memory of each parameter by
name; of each optimizer ``others``, what it remembers beside, and ``groups``, without parameters;
``also``, the states of other objects."""


class Live:
    """What is copied and set back: what is trained, buffers, the optimizers' memory, and others."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        also: Sequence[Any],
        *,
        offload: bool,
    ) -> None:
        self.model, self.optimizers, self.also = model, optimizers, also
        self.names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        """Of the model's parameters; ``trained`` has those that are copied."""
        self._place = torch.device("cpu") if offload else None
        self._buffers = dict(model.named_buffers())
        self._sound: dict[str, bool] = {}
        """Of each buffer, whether it was finite when it was first seen: masks aren't."""
        _check_rates(optimizers)
        _check_schedulers(also, optimizers)
        self._forgetful = not any(one.state for one in optimizers)
        self.note()

    def note(self) -> None:
        """What no optimizer trains is as it must stay from now on."""
        trained = self.trained()
        self._still = {p: written(p) for p in self.names if p not in trained}

    def trained(self) -> dict[Tensor, Optimizer]:
        found: dict[Tensor, Optimizer] = {}
        for one in self.optimizers:
            params = (param for group in one.param_groups for param in group["params"])
            for param in (param for param in params if param.requires_grad):
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

    def check_still(self) -> None:
        """Refuse changes of what no optimizer trains: it would not go back."""
        for param, before in self._still.items():
            if written(param) != before and param not in self.trained():
                raise ValueError(
                    "parameters that no optimizer trains must stay as they are while Rewind "
                    f"watches, got another {self.names[param]} (also= takes what goes back beside)"
                )

    def fits(self, content: Content) -> bool:
        """Whether a copy has all that is trained."""
        return all(self.names[p] in content["model"] for p in self.trained())

    def are_finite(self) -> tuple[Tensor, Tensor]:
        """Whether what is trained and the buffers are, as tensors on their device."""
        buffers = buffers_of(self.model).items()
        return (
            are_finite(self.trained()),
            are_finite(buffer for name, buffer in buffers if self._sound.get(name)),
        )

    def memory_is_finite(self) -> Tensor:
        """Whether what the optimizers remember of their parameters is."""
        entries = (one.state.get(p, {}) for p, one in self.trained().items())
        return are_finite(
            value
            for entry in entries
            for value in entry.values()
            if (type(value) in PLAIN and not value.is_meta) or is_sharded(value)
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, old: Content | None = None) -> Content:
        """A copy, in the tensors of an ``old`` one as far as they fit."""
        trained = self.trained()
        model = {self.names[p]: p for p in trained} | buffers_of(self.model)
        remembered = {self.names[p]: one.state[p] for p, one in trained.items() if one.state.get(p)}
        others = {str(k): _of_no_parameter(one) for k, one in enumerate(self.optimizers)}
        for name, buffer in buffers_of(self.model).items():
            if name not in self._sound:
                self._sound[name] = bool(are_finite([buffer]))
        now = {"model": model, "optimizer": remembered, "others": others}
        now["also"] = [one.state_dict() for one in self.also]
        groups = [[options_of(group) for group in one.param_groups] for one in self.optimizers]
        return {**copied(now, old, self._place), "groups": copy.deepcopy(groups)}

    @torch.no_grad()
    def set_buffers_back(self, content: Content) -> None:
        """Alone, but for those that came later or have grown since."""
        for name, buffer in own_buffers(self.model, self._buffers).items():
            before = content["model"].get(name)
            if before is not None and before.shape == buffer.shape:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(before, non_blocking=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_back(self, content: Content, *, forget: bool = False) -> bool:
        """All of it; ``forget``: with a memory as before the first step, if that was none.

        Returns:
            Whether it is so.
        """
        trained = self.trained()
        self.set_buffers_back(content)
        forget = forget and self._forgetful
        groups = copy.deepcopy(content["groups"])
        for k, (one, its_groups) in enumerate(zip(self.optimizers, groups, strict=True)):
            set_back(one.param_groups, its_groups)
            state: Any = one.state
            for key in _of_no_parameter(one):
                del state[key]
            state.update(copied(content["others"][str(k)]))
        for param, optimizer in trained.items():
            name = self.names[param]
            if name in content["model"]:  # else it came later
                param.copy_(content["model"][name], non_blocking=True)
            if param.grad is not None:  # of where it was: there may be a step before the next one
                param.grad.zero_()
            now = optimizer.state.pop(param, {})
            before = {} if forget else content["optimizer"].get(name, {})
            for key, value in before.items():
                whole = isinstance(value, Tensor) and value.shape == param.shape
                place = param.device if whole or isinstance(value, list | tuple) else None
                optimizer.state[param][key] = copied(value, now.get(key), place)
        for one, its_state in zip(self.also, content["also"], strict=True):
            place = copy.deepcopy(one.state_dict())  # on the devices where it has its tensors
            one.load_state_dict(copied(its_state, place))
            if hasattr(one, "get_last_lr"):  # a scheduler, of which what it sets is a part
                for optimizer, its_groups in zip(self.optimizers, groups, strict=True):
                    if _optimizer_of(one) in (None, optimizer):
                        set_back(optimizer.param_groups, its_groups, settings=True)
        return forget

    def opened(self, content: Content, rank: int) -> Content:
        """A copy of what was saved, in its places; refuse another model's, or another rank's."""
        place = self.copy()
        kept = {*self.names.values(), *self.model.state_dict()}
        for name, ours in place["model"].items():
            theirs = content["model"].get(name)
            got = "one without" if theirs is None else f"shape {tuple(theirs.shape)}"
            if got == f"shape {tuple(ours.shape)}":
                check_rank(ours, theirs, rank, "state")
            elif name in kept:  # other buffers are in no model's state, so a fresh one lacks them
                raise ValueError(
                    f"state must be of this model, with {name} of shape {tuple(ours.shape)}, got "
                    f"{got}"
                )
        if len(content["others"]) != len(self.optimizers):
            raise ValueError("state must be of as many optimizers, got other ones")
        bool(self.are_finite()[0])  # waits for copies, which would come later than these
        return copied(content, place, self._place)


@dataclass
class Snapshot:
    """A copy of a run.

    Attributes:
        step: of those that led to it, without what was thrown away.
        call: of ``observe``, after which it was made.
        rank: how long it is kept: one of a rank takes the place of an older one of it.
        content: what ``Live`` has copied.
    """

    step: int
    call: int
    rank: int
    content: Content


class Store:
    """Copies of a run, the youngest last: the last two where the model is; in the host's memory
    five, of some 64, 256, 1,024, 4,096 and 16,384 steps."""

    def __init__(self, live: Live, *, offload: bool) -> None:
        self._live = live
        self._most, self._ratio = (5, 4) if offload else (2, 2)
        self._saves = 0
        self._snapshots: list[Snapshot] = []

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    @property
    def youngest(self) -> Snapshot:
        return self._snapshots[-1]

    def nth_youngest(self, n: int) -> Snapshot:
        """The youngest for 0, the one before it for 1, and so on to the oldest."""
        return self._snapshots[-1 - min(n, len(self._snapshots) - 1)]

    def save(self, step: int, call: int, good: int) -> None:
        """Copy the run as it is; if it isn't good itself, the youngest of step ``good`` stays."""
        self._saves += 1
        rank = 0
        while rank < self._most - 1 and self._saves % self._ratio ** (rank + 1) == 0:
            rank += 1
        full = len(self._snapshots) == self._most
        kept = self.before(good) if step > good else None
        old = self._in_excess(rank, kept) if full else None
        content = self._live.copy(old.content if old else None)
        if old:
            self._snapshots.remove(old)
        self._snapshots.append(Snapshot(step, call, rank, content))

    def before(self, step: int) -> Snapshot | None:
        """The youngest that was made at a step or before it, and has all that is trained now."""
        found = [
            one for one in self._snapshots if one.step <= step and self._live.fits(one.content)
        ]
        return found[-1] if found else None

    def forget_after(self, snapshot: Snapshot) -> None:
        self._snapshots = self._snapshots[: self._snapshots.index(snapshot) + 1]

    def numbers(self, suspect: Snapshot | None) -> dict[str, Any]:
        """All of it, with another one beside."""
        return {
            "snapshots": [_row(one) for one in self._snapshots],
            "suspect": suspect and _row(suspect),
            "saves": self._saves,
            "rank": this_rank(),
        }

    def opened(self, numbers: dict[str, Any] | None) -> tuple[list[Snapshot], Snapshot | None, int]:
        """What was saved: copies, the one beside, and how often it had saved; refuse others'."""
        if numbers is None:
            return [], None, 0
        rank, suspect = numbers["rank"], numbers["suspect"]
        made = [self._opened(row, rank) for row in numbers["snapshots"]]
        return made, suspect and self._opened(suspect, rank), numbers["saves"]

    def become(self, snapshots: list[Snapshot], saves: int) -> None:
        self._snapshots, self._saves = snapshots, saves

    def _opened(self, row: Sequence[Any], rank: int) -> Snapshot:
        step, call, its_rank, content = row
        return Snapshot(step, call, its_rank, self._live.opened(content, rank))

    def _in_excess(self, rank: int, kept: Snapshot | None) -> Snapshot:
        """The oldest that isn't the only one of its rank, for another one of a rank."""
        ranks = [rank, *(one.rank for one in self._snapshots)]
        free = [one for one in self._snapshots if one is not kept]
        double = [one for one in free if ranks.count(one.rank) > 1]
        return (double or free)[0]


def _row(one: Snapshot) -> list[Any]:
    return [one.step, one.call, one.rank, one.content]


def _check_rates(optimizers: Sequence[Optimizer]) -> None:
    if any(group.get("lr") is None for one in optimizers for group in one.param_groups):
        raise ValueError("optimizer must have a rate, lr, in each of its groups, got one without")


def _check_schedulers(also: Sequence[Any], optimizers: Sequence[Optimizer]) -> None:
    for one in also:
        if not callable(getattr(one, "load_state_dict", None)):
            raise ValueError(f"also must be objects with a state_dict, got {type(one).__name__}")
        if _optimizer_of(one) not in (None, *optimizers):
            raise ValueError(
                "also must be of this optimizer, if of any, got one of another, a "
                f"{type(one).__name__}"
            )


def _of_no_parameter(optimizer: Optimizer) -> dict[Any, Any]:
    return {key: one for key, one in optimizer.state.items() if not isinstance(key, Tensor)}


def _optimizer_of(scheduler: Any) -> Optimizer | None:
    """The one whose rates it sets, beneath wrappers of both; None: it has none that it tells."""
    inner = getattr(scheduler, "scheduler", scheduler)  # as Accelerate wraps it
    of = getattr(inner, "optimizer", None)
    return innermost(of) if isinstance(of, Optimizer) else None


def copied(value: Any, old: Any = None, place: torch.device | None = None) -> Any:
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
    if strided and device.type == "cpu" and value.device.type == "cuda":
        pinned = torch.empty_like(value, device=device, pin_memory=True)
        return pinned.copy_(value, non_blocking=True)
    return value.to(device, copy=True)
