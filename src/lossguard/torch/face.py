"""What a guard shows of itself, as an optimizer: all but ``step`` and ``lanes``."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lossguard.torch.decision import Decision

if TYPE_CHECKING:
    from lossguard.torch.lane import Lane
    from lossguard.torch.memory import Inner
    from lossguard.torch.rates import Rates
    from lossguard.torch.weights import Weights


class Face(Optimizer):
    """Attributes and methods for loops and trainers.

    Attributes:
        nt: train minibatches per cycle.
        nc: check minibatches per cycle.
        phase: minibatches seen of this cycle; 0 between cycles.
        steps: optimizer steps of the live lane in all cycles so far.
        history: the last 1,000 decisions.
    """

    remembered: tuple[str, ...] = ()
    """What the rules of a guard know, by the names of its attributes."""
    nt: int
    nc: int
    phase: int
    steps: int
    history: deque[Decision]
    process_group: "distributed.ProcessGroup | None"
    callback: Callable[[Decision], object] | None
    _weights: "Weights"
    _inners: "list[Inner]"
    _rates: "Rates"
    _lanes: "dict[str, Lane]"
    _leader: "Lane"
    _others: "list[Lane]"
    _inside: "Lane | None"
    _built: bool
    _filled: bool

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

    def __getstate__(self) -> dict[str, Any]:
        raise ValueError(
            "a guard can't be copied or pickled, as the copy's optimizers would have no model: "
            "build another one, and load state_dict() into it"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._lanes.values()))})"
