"""How often the learned lanes run: in every cycle, or ever less often while they lose."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..validation import check_choice, check_count

Start = Literal["keep", "reset"]


class ProbingState(NamedTuple):
    """Counts of cycles, int32."""

    lost: Int[Array, ""]
    """Probes that the learned lanes lost running."""
    wait: Int[Array, ""]
    """Cycles without them after the last probe."""
    left: Int[Array, ""]
    """Cycles still to go until the next one; 0: the next cycle is a probe."""


class Probing(NamedTuple):
    """``update(state, probed, won)``: the state after a cycle. A cycle with left = 0 is a probe."""

    update: Callable[[ProbingState, Bool[Array, ""], Bool[Array, ""]], ProbingState]
    ever_skips: bool
    start: Start
    """What optimizer state a probe after a wait starts from."""


def init_probing() -> ProbingState:
    """The state before the first cycle, which is a probe."""
    return ProbingState(jnp.int32(0), jnp.int32(0), jnp.int32(0))


def always() -> Probing:
    """Learned lanes run in every cycle: the paper's guard.

    >>> always().ever_skips
    False
    """
    return Probing(lambda state, probed, won: state, False, "keep")


def backoff(*, patience: int = 10, most: int = 128, start: Start = "keep") -> Probing:
    """After ``patience`` losses running, wait 1, 2, 4, ... up to ``most`` cycles between probes.

    Between probes only the fallback runs, and no check minibatches are spent. A win brings the
    learned lanes back into every cycle.

    Args:
        patience: losses running after which waits begin.
        most: the longest wait, in cycles.
        start: what a probe after a wait starts from: "keep", the optimizer state that the learned
            lane had at its last probe, or "reset", a fresh one.

    Raises:
        ValueError: if patience or most is below 1, or start is neither of the two.

    >>> rule, state = backoff(patience=2), init_probing()
    >>> for probed in (True, True, False, True):
    ...     state = rule.update(state, jnp.array(probed), jnp.array(False))
    >>> int(state.lost), int(state.wait), int(state.left)
    (3, 2, 2)
    """
    patience, most = check_count("patience", patience), check_count("most", most)
    check_choice("start", start, get_args(Start))

    def update(state: ProbingState, probed: Bool[Array, ""], won: Bool[Array, ""]) -> ProbingState:
        lost = jnp.where(won, 0, state.lost + 1)
        wait = jnp.where(lost >= patience, jnp.clip(2 * state.wait, 1, most), 0)
        waiting = state._replace(left=state.left - 1)
        return ProbingState(
            jnp.where(probed, lost, waiting.lost),
            jnp.where(probed, wait, waiting.wait),
            jnp.where(probed, wait, waiting.left),
        )

    return Probing(update, True, start)
