"""One schedule on the guard drives all of its optimizers in proportion."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.memory import IDENTITY, same
from lossguard.torch.tensors import clone

Group = dict[str, Any]


class Rates:
    """Carries what is set in the guard's parameter groups over to its optimizers.

    A guard's groups begin as copies of the fallback's. As long as nothing is set in them, the
    optimizers' own groups, and schedulers on them, are left alone. Once a rate is set, of a group
    whose rate was lr_0 when the guard was built,

        rate of an optimizer  <-  its rate when the guard was built  *  lr / lr_0

    Any other option that is set goes to every optimizer that has it.

    Args:
        groups: the guard's.
        optimizers: those that it runs.
    """

    def __init__(self, groups: list[Group], optimizers: Sequence[Optimizer]) -> None:
        self.groups = groups
        self.optimizers = optimizers
        self.base = [_rate(group) for group in groups]
        self.bases = [[_rate(group) for group in one.param_groups] for one in optimizers]
        self.set: list[list[float | None]] | None = None
        """The rates that the optimizers were given, if any were."""
        self.seen = [_options(group) for group in groups]
        where = {id(p): k for k, group in enumerate(groups) for p in group["params"]}
        self.parts = [
            [sorted({where[id(p)] for p in group["params"]}) for group in one.param_groups]
            for one in optimizers
        ]

    def apply(self) -> None:
        """Carry over what has been set since the last time.

        Raises:
            ValueError: if rates were set both here and in an optimizer, or can't be in proportion.
        """
        changes = [
            {key: group[key] for key in seen if key in group and not same(seen[key], group[key])}
            for group, seen in zip(self.groups, self.seen, strict=True)
        ]
        if not any(changes):
            return
        for k, changed in enumerate(changes):
            for key in changed.keys() - {"lr"}:
                self._hand_on(k, key, changed[key])
        if any("lr" in changed for changed in changes):
            self._scale()
        self.seen = [_options(group) for group in self.groups]

    def numbers(self) -> Group:
        """What a ``state_dict`` holds of it."""
        return clone({"base": self.base, "bases": self.bases, "set": self.set})

    def load(self, numbers: Group) -> None:
        """Go on from ``numbers``, and from groups that are loaded already."""
        self.base, self.bases, self.set = (
            clone(numbers[name]) for name in ("base", "bases", "set")
        )
        self.seen = [_options(group) for group in self.groups]

    def _hand_on(self, k: int, key: str, value: Any) -> None:
        for optimizer, parts in zip(self.optimizers, self.parts, strict=True):
            for group, of in zip(optimizer.param_groups, parts, strict=True):
                if k in of and key in group:
                    group[key] = value

    def _scale(self) -> None:
        factors = []
        for group, base in zip(self.groups, self.base, strict=True):
            if base == 0 or base is None:
                raise ValueError(
                    "rates must be positive when the guard is built, to be set in proportion, got "
                    f"{base}"
                )
            factors.append(float(group["lr"]) / base)
        now = [[_rate(group) for group in one.param_groups] for one in self.optimizers]
        if now != (self.bases if self.set is None else self.set):
            raise ValueError(
                "rates must be set in the guard's groups or in its optimizers', got both (a "
                "scheduler on the guard drives all of them)"
            )
        for k, optimizer in enumerate(self.optimizers):
            for j, group in enumerate(optimizer.param_groups):
                self._set(group, self.bases[k][j], [factors[f] for f in self.parts[k][j]])
        self.set = [[_rate(group) for group in one.param_groups] for one in self.optimizers]

    def _set(self, group: Group, base: float | None, factors: list[float]) -> None:
        if base is None:
            warnings.warn(
                "an optimizer without lr isn't driven by the guard's schedule",
                RuntimeWarning,
                stacklevel=5,
            )
            return
        if not all(math.isclose(factor, factors[0]) for factor in factors):
            raise ValueError(
                "rates of the guard's groups must change in proportion, where an optimizer has one "
                f"group for them, got factors {factors}"
            )
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(base * factors[0])
        else:
            group["lr"] = base * factors[0]


def copied(group: Group) -> Group:
    """A parameter group with the same parameters, and a rate that is a plain number."""
    numbers = {"lr": _rate(group)} if "lr" in group else {}
    return {**group, **numbers, "params": list(group["params"])}


def _rate(group: Group) -> float | None:
    return float(group["lr"]) if "lr" in group else None


def _options(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in IDENTITY}
