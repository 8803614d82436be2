"""Looks for mistakes of a loop that would train nothing, or compare lanes wrongly, in silence."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lossguard.torch.arguments import check_accumulation
from lossguard.torch.closures import Closure
from lossguard.torch.memory import Inner
from lossguard.torch.weights import Weights

if TYPE_CHECKING:
    from lossguard.torch.lane import Lane

SAME = 1e-4
"""The part of a loss by which rounding may change it."""


class Watch:
    """Refuses what is surely wrong, and warns once of what may be."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.twins: set[str] = set()
        """Lanes that begin the cycle at one point."""
        self._first = True
        self._warned: set[str] = set()

    def check(self, inners: Sequence[Inner]) -> None:
        """Refuse gradients from before the minibatch, and parameters that came later."""
        for inner in inners:
            count = sum(len(group["params"]) for group in inner.optimizer.param_groups)
            ours = len(self.weights.params)
            if count != ours:
                raise ValueError(
                    "parameters must be in the optimizers when the guard is built, got "
                    f"{type(inner.optimizer).__name__} with {count} instead of {ours}"
                )
        if self._first:
            check_accumulation()
        if self.weights.have_gradients():
            raise ValueError(
                "gradients must be computed inside the closure, got some before the step (call "
                "zero_grad before it, and accumulate inside the closure)"
            )

    def run(self, lane: "Lane", closure: Closure) -> Any:
        """Run a lane; refuse closures that change what all lanes share, at the first time."""
        others = self.weights.others() if self._first else []
        versions = [p._version for p in others]
        value = lane.run(closure)
        if versions != [p._version for p in others]:
            raise ValueError(
                "parameters of model that no optimizer has must not change in the closure, as all "
                "lanes share them: give them to the optimizers, without gradients"
            )
        self._first = False
        return value

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
        """Warn that a lane is left for an error."""
        self._warn(
            f"{lane} has numbers that aren't finite and raised {error!r}: it is left out of such "
            "cycles",
            "errors",
        )

    def _warn(self, message: str, what: str) -> None:
        """Once for each kind."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
