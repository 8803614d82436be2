"""What a guard shows of itself, beside the parameter groups of any optimizer."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lossguard.torch.decision import Decision


class Face(Optimizer):
    """Attributes and methods for loops, apart from ``step`` and ``lanes``."""

    nt: int
    phase: int
    history: deque[Decision]
    _lanes: Mapping[str, Any]
    _leader: Any
    _inside: Any
    _built: bool

    @property
    def checking(self) -> bool:
        """Whether only the loss of the next minibatch is evaluated."""
        return self.phase >= self.nt

    @property
    def last_decision(self) -> Decision | None:
        """That of the last cycle."""
        return self.history[-1] if self.history else None

    @property
    def scaler(self) -> GradScaler:
        """The gradient scaler of the lane in the model; use it inside the closure, or the body."""
        lane = self._inside or self._leader
        if lane.scaler is None:
            kind = type(self).__name__
            raise AttributeError(f"scaler must be given to {kind} to scale losses, got None")
        return lane.scaler

    def unscale_(self) -> None:
        """Unscale the gradients of the lane in the model, to clip them."""
        if not self.checking:
            self.scaler.unscale_((self._inside or self._leader).optimizer)

    def eval(self) -> None:
        """Have the model be what an optimizer with ``train()`` and ``eval()`` evaluates."""
        if self._leader.switches:
            with torch.no_grad(), self._leader.inner.stepping():
                self._leader.optimizer.eval()  # pyright: ignore

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused, except when the guard is built."""
        if self._built:
            raise ValueError(
                "parameters must be in the optimizers when the guard is built, got others later: "
                "build another guard"
            )
        super().add_param_group(param_group)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._lanes.values()))})"
