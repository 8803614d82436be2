"""Looks for mistakes of a loop that would train nothing, or compare lanes wrongly, in silence."""

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lossguard.torch.lane import Lane
    from lossguard.torch.memory import Inner
    from lossguard.torch.weights import Weights

SAME = 1e-4
"""The part of a loss by which rounding may change it."""


class Watch:
    """Refuses what is surely wrong, and warns once of what may be."""

    def __init__(self, weights: "Weights") -> None:
        self.weights = weights
        self.twins: set[str] = set()
        """Lanes that begin the cycle at one point."""
        self._warned: set[str] = set()

    def check(self, inners: "Sequence[Inner]") -> None:
        """Refuse gradients from before the minibatch, and parameters that came later."""
        for inner in inners:
            count = sum(len(group["params"]) for group in inner.optimizer.param_groups)
            ours = len(self.weights.params)
            if count != ours:
                raise ValueError(
                    "parameters must be in the optimizers when the guard is built, got "
                    f"{type(inner.optimizer).__name__} with {count} instead of {ours}"
                )
        accelerate = sys.modules.get("accelerate.state")
        steps = accelerate.GradientState().num_steps if accelerate else 1
        if steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps must be 1 for Accelerate, got {steps}: it would "
                "leave out the guard's calls in between (accumulate in the body, before lane.step)"
            )
        if self.weights.have_gradients():
            raise ValueError(
                "gradients must be computed inside the closure, got some before the step (call "
                "zero_grad before it, and accumulate inside the closure)"
            )

    def compare(self, lanes: "Sequence[Lane]", firsts: Sequence[Sequence[float]]) -> None:
        """Warn if lanes have different losses on one minibatch at the same parameters."""
        at_once = [
            row[0]
            for lane, row in zip(lanes, firsts, strict=True)
            if row and not lane.switches and lane.name in self.twins
        ]
        low, high = min(at_once, default=0.0), max(at_once, default=0.0)
        if high - low > SAME * max(abs(low), abs(high)):
            self._warn(
                f"closure gave different losses at the same parameters ({high:.4g} and {low:.4g}): "
                "draw the minibatch, and all random numbers but PyTorch's, outside it",
                "losses",
            )

    def tell(self, error: Exception, lane: "Lane") -> None:
        """Warn that a lane's minibatch is lost to an error."""
        self._warn(
            f"{lane} has numbers that aren't finite and raised {error!r}: such minibatches count "
            "as lost for it",
            "errors",
        )

    def _warn(self, message: str, what: str) -> None:
        """Once for each kind."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
