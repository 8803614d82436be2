"""Looks for mistakes of a loop that would train nothing, or compare lanes wrongly, in silence."""

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lossguard.torch.tensors import read

if TYPE_CHECKING:
    from lossguard.torch.lane import Lane
    from lossguard.torch.memory import Inner
    from lossguard.torch.weights import Weights

SAME = 1e-4
"""The part of a loss by which rounding may change it."""


def check(weights: "Weights", inners: "Sequence[Inner]") -> None:
    """Refuse gradients from before the minibatch, and parameters that came later."""
    for inner in inners:
        count = sum(len(group["params"]) for group in inner.optimizer.param_groups)
        if count != len(weights.params):
            raise ValueError(
                "parameters must be in the optimizers when the guard is built, got "
                f"{type(inner.optimizer).__name__} with {count} instead of {len(weights.params)}"
            )
    accelerate = sys.modules.get("accelerate.state")
    steps = accelerate.GradientState().num_steps if accelerate else 1
    if steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps must be 1 for Accelerate, got {steps}: it would "
            "leave out the guard's calls in between (accumulate in the body, before lane.step)"
        )
    if weights.have_gradients():
        raise ValueError(
            "gradients must be computed inside the closure, got some before the step (call "
            "zero_grad before it, and accumulate inside the closure)"
        )


def compare(lanes: "Sequence[Lane]") -> None:
    """Warn if lanes that were at one point had different losses on the first minibatch there."""
    losses = read([lane.losses[0] for lane in lanes if not lane.switches])
    low, high = min(losses, default=0.0), max(losses, default=0.0)
    if high - low > SAME * max(abs(low), abs(high)):
        warnings.warn(
            f"closure gave different losses at the same parameters ({high:.4g} and {low:.4g}): "
            "draw the minibatch, and all random numbers but PyTorch's, outside it",
            RuntimeWarning,
            stacklevel=2,
        )


def tell(error: Exception, lane: "Lane") -> None:
    """Warn that a lane's minibatch is lost to an error."""
    warnings.warn(
        f"{lane} has numbers that aren't finite and raised {type(error).__name__}: such "
        "minibatches count as lost for it",
        RuntimeWarning,
        stacklevel=2,
    )
