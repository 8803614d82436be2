"""The entries of an optimizer's parameter groups, as settings that may change."""

from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


def options_of(group: Group) -> Group:
    """The entries of a parameter group, without its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def same(old: Any, new: Any) -> bool:
    """Whether a group entry is as it was; what holds tensors only if it is the same object."""
    plain = (int, float, str, tuple, type(None))
    return old is new or (isinstance(old, plain) and isinstance(new, plain) and old == new)


def set_rate(group: Group, rate: float | Tensor) -> None:
    """Set the rate, which may be a tensor that must stay the same one."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(torch.as_tensor(rate))
    else:
        group["lr"] = rate
