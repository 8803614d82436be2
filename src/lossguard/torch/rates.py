"""One schedule on the guard drives all of its optimizers in proportion."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]
"""A parameter group of an optimizer."""
PARAMS = {"params", "param_names"}
SETTINGS = PARAMS | {
    "lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum",
    "momentum", "betas", "weight_decay", "eps", "name",
}  # fmt: skip
"""Its entries that are set from outside. All others count as what the optimizer remembers: a step
may change them, as it does counters, and estimates of the rate."""


class Rates:
    """Carries what is set in the guard's parameter groups over to its optimizers.

    A guard's groups begin as copies of the fallback's. As long as nothing is set in them, the
    optimizers' own groups, and schedulers on them, are left alone. Once a rate is set, of a group
    whose rate was lr_0 when the guard was built,

        rate of an optimizer  <-  its rate when the guard was built  *  lr / lr_0

    Any other option that is set goes to every optimizer that has it; of a tuple, such as Adam's
    betas, the entries that were changed.
    """

    def __init__(self, groups: list[Group], optimizers: Sequence[Optimizer]) -> None:
        self.groups = groups
        where = {id(p): k for k, group in enumerate(groups) for p in group["params"]}
        self._optimizers = optimizers
        self._of = [sorted({where[id(p)] for p in group["params"]}) for group in self._theirs()]
        """Of each group of theirs the numbers of the guard's groups that it has parameters of."""
        self.bases = [_rate(group) for group in self._theirs()]
        """Their rates when the guard was built; the first optimizer's were those of ``groups``."""
        self.given = list(self.bases)
        """The rates that they have, unless somebody else has set them."""
        self.stepping = False
        """Whether a lane takes a step."""
        self.note()

    def _theirs(self) -> list[Group]:
        """The groups of the optimizers: other ones after their ``load_state_dict``."""
        return [group for one in self._optimizers for group in one.param_groups]

    def note(self) -> None:
        """What differs from now on has been set."""
        self.seen = [options_of(group) for group in self.groups]
        self._written = [written(group.get("lr")) for group in self.groups]

    def changes(self) -> list[Group]:
        """What has been set since the last time, in each of the guard's groups."""
        return [
            {
                key: group[key]
                for key in seen.keys() & group.keys()
                if not same(seen[key], group[key]) or (key == "lr" and written(group[key]) != then)
            }
            for group, seen, then in zip(self.groups, self.seen, self._written, strict=True)
        ]

    def mark(self) -> None:
        """Rates that differ from now on have been set while lanes run."""
        self._marks = self._now()

    def check(self) -> None:
        """Refuse such rates, as each lane may be at another one then."""
        if self._now() != self._marks:
            raise ValueError(
                "rates must be set between minibatches, got another one in a body or closure (take "
                "scheduler.step() out of it)"
            )

    @contextmanager
    def scaled(self, optimizer: Optimizer, part: float) -> Iterator[None]:
        """While a lane steps: the rates of its optimizer are a part of what they are."""
        groups = [group for group in optimizer.param_groups if group.get("lr") is not None]
        rates = [copied_rate(group) for group in groups] if part < 1 else []
        self.stepping = True
        try:
            set_rates(groups, [rate * part for rate in rates])
            yield
        finally:
            self.stepping = False
            set_rates(groups, rates)
            self.mark()  # some optimizers set their own

    def _now(self) -> list[Any]:
        rates = [group.get("lr") for group in (*self.groups, *self._theirs())]
        return [written(rate) if isinstance(rate, Tensor) else rate for rate in rates]

    def saved(self) -> list[tuple[float | None, float | None, Group]]:
        """What a checkpoint has of each group of theirs: both rates, and the settings."""
        settings = [
            {key: value for key, value in group.items() if key in SETTINGS - PARAMS}
            for group in self._theirs()
        ]
        return list(zip(self.bases, self.given, settings, strict=True))

    def go_on(self, saved: list[tuple[float | None, float | None, Group]]) -> None:
        """Go on from saved rates, with what is in the guard's groups now."""
        self.bases = [base for base, _, _ in saved]
        self.given = [rate for _, rate, _ in saved]
        for group, (_, _, settings) in zip(self._theirs(), saved, strict=True):
            group.update(settings)
        self.note()

    def apply(self) -> None:
        """Carry over what has been set since the last time; refuse rates that were set twice."""
        if all(group.get("initial_lr") == 0 for group in self.groups):
            raise ValueError(
                "rates must be positive when the guard is built, for a scheduler to multiply them, "
                "got 0 (build the guard before schedulers of its optimizers)"
            )
        changes = self.changes()
        for k, changed in enumerate(changes):
            for key in changed.keys() - {"lr"}:
                for group, of in zip(self._theirs(), self._of, strict=True):
                    if k in of and key in group:
                        group[key] = _carried(self.seen[k][key], changed[key], group[key])
        if any("lr" in changed for changed in changes):
            self._scale()
        if any(changes):
            self.note()
        self.mark()

    def _scale(self) -> None:
        factors: dict[int, float] = {}
        for k, (group, base) in enumerate(zip(self.groups, self.bases, strict=False)):
            if base:
                rate = float(group["lr"])
                if not math.isfinite(rate):
                    raise ValueError(f"rates must be finite, got {rate}")
                factors[k] = rate / base
            elif base is None or group["lr"] != 0:
                raise ValueError(
                    "rates must be positive when the guard is built, to be set in proportion, got "
                    f"{base}"
                )
        if [_rate(group) for group in self._theirs()] != self.given:
            raise ValueError(
                "rates must be set in the guard's groups or in its optimizers', got both (a "
                "scheduler on the guard drives all of them)"
            )
        for group, of, base in zip(self._theirs(), self._of, self.bases, strict=True):
            first, *others = [factors[k] for k in of if k in factors] or [1.0]
            if base is None:
                warnings.warn(
                    "an optimizer without lr isn't driven by the guard's schedule",
                    RuntimeWarning,
                    stacklevel=4,
                )
                continue
            if not all(math.isclose(first, other) for other in others):
                raise ValueError(
                    "rates of the guard's groups must change in proportion, where an optimizer has "
                    f"one group for them, got factors {[first, *others]}"
                )
            set_rate(group, base * first)
        self.given = [_rate(group) for group in self._theirs()]


def _carried(before: Any, now: Any, theirs: Any) -> Any:
    """An option that was set; of several numbers those that were, as where momentum is cycled."""
    if not all(isinstance(one, tuple | list) for one in (before, now, theirs)):
        return now
    rows = zip(theirs, before, now, strict=False)
    made = [its if same(was, new) else new for its, was, new in rows]
    return (list if isinstance(theirs, list) else tuple)([*made, *theirs[len(made) :]])


def group_copy(group: Group) -> Group:
    """A parameter group with the same parameters, and a rate that is a plain number.

    Schedulers on it begin there, and not at the base of one that the group had before.
    """
    numbers = {} if _rate(group) is None else {"lr": _rate(group)}
    kept = {key: value for key, value in group.items() if key != "initial_lr"}
    return {**kept, **numbers, "params": list(group["params"])}


def _rate(group: Group) -> float | None:
    return None if group.get("lr") is None else float(group["lr"])


def written(value: Any) -> int | None:
    """How often a tensor was written to: some schedulers change rates in place."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def beside_state(optimizer: Any) -> dict[str, Any]:
    """What an optimizer holds beside its state and its groups, by attribute."""
    return {k: one for k, one in vars(optimizer).items() if k not in ("state", "param_groups")}


def options_of(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in PARAMS}


def set_back(groups: Iterable[Group], options: Iterable[Group], *, settings: bool = False) -> None:
    """Set what is remembered in the groups that there were to what it was; and the settings."""
    for group, before in zip(groups, options, strict=False):
        for name in group.keys() - SETTINGS - before.keys():
            del group[name]  # which a step has made
        if settings:
            set_rate(group, float(before["lr"]))
        left = {"lr"} if settings else SETTINGS
        group.update({name: value for name, value in before.items() if name not in left})


def same(old: Any, new: Any) -> bool:
    """Whether a setting is as it was; what holds tensors only if it is the same object."""
    plain = (int, float, str, tuple, type(None))
    return old is new or (isinstance(old, plain) and isinstance(new, plain) and old == new)


def copied_rate(group: Group) -> float | Tensor:
    """The rate, which stays what it is if the group's is changed in place."""
    return group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]


def set_rates(groups: Sequence[Group], rates: Sequence[float | Tensor]) -> None:
    """Set the rate of each group, where one is given; groups may share a tensor."""
    for group, rate in zip(groups, rates, strict=False):
        set_rate(group, rate)


def set_rate(group: Group, rate: float | Tensor) -> None:
    """Set the rate, which may be a tensor that must stay the same one."""
    if isinstance(group["lr"], Tensor):
        with torch.inference_mode(group["lr"].is_inference()):
            group["lr"].copy_(torch.as_tensor(rate, device=group["lr"].device))
    else:
        group["lr"] = rate
