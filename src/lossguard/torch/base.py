"""What the guards have in common as optimizers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.closures import checked
from lossguard.torch.decision import Decision
from lossguard.torch.facade import Closure, Facade
from lossguard.torch.weights import Weights


class Guard(Facade):
    """A facade of the fallback that keeps a history of decisions.

    Attributes:
        learned: the optimizer that isn't trusted, or several.
        fallback: the one that is.
        history: all decisions.
    """

    def __init__(
        self, learned: Optimizer | Sequence[Optimizer], fallback: Optimizer, weights: Weights
    ) -> None:
        super().__init__(fallback)
        self.learned = learned
        self.fallback = fallback
        self.history: list[Decision] = []
        self._weights = weights

    @property
    def last_decision(self) -> Decision | None:
        """The last decision: of a whole cycle, or of nt whole steps of the residual guard."""
        return self.history[-1] if self.history else None

    def _check_step(self, closure: Closure | None, hint: str = "") -> Closure:
        """The closure of a step; refuse others, and gradients that it has not computed."""
        closure = checked(closure, hint)
        if any(p.grad is not None for p in self._weights.params):
            raise ValueError(
                "gradients must be computed inside the closure, got some before the step (call "
                "zero_grad, and accumulate inside the closure)"
            )
        return closure

    def _check_saved(self, saved: dict[str, Any], key: str) -> dict[str, Any]:
        """What a ``state_dict`` holds beside the optimizers; refuse another kind, without key."""
        state = saved.get("guard", saved)
        if key not in state or state is saved:
            raise ValueError(
                f"state_dict must be a {type(self).__name__}'s, got one with the keys {list(state)}"
            )
        return state

    def _add_group(self, param_group: dict[str, Any], learned: Sequence[Optimizer]) -> list[Tensor]:
        """Add parameters to all optimizers, with their own defaults in ``learned``; return them."""
        self.fallback.add_param_group(param_group)
        params = self.fallback.param_groups[-1]["params"]
        for one in learned:
            one.add_param_group({"params": list(params)})
        return list(params)
