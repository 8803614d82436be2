"""How often the learned lanes run: in every cycle, or ever less often while they lose."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

from lossguard.validation import check_choice, check_count

Start = Literal["keep", "reset"]


class ProbingState(NamedTuple):
    """Counts of cycles.

    Attributes:
        lost: probes that the learned lanes lost running.
        wait: cycles without them after the last probe.
        left: cycles still to go until the next one; 0: this cycle is a probe.
    """

    lost: int = 0
    wait: int = 0
    left: int = 0


class Probing(NamedTuple):
    """A rule for the cycles in which the learned lanes run.

    Attributes:
        update: the state after a cycle, given whether it was a probe, and whether a learned lane
            won. A cycle with left = 0 is a probe.
        start: what memory a probe after a wait starts from.
    """

    update: Callable[[ProbingState, bool, bool], ProbingState]
    start: Start


def always() -> Probing:
    """Learned lanes run in every cycle: the paper's guard.

    >>> always().update(ProbingState(), True, False).left
    0
    """
    return Probing(_always, "keep")


def backoff(*, patience: int = 10, most: int = 128, start: Start = "keep") -> Probing:
    """After ``patience`` losses running, wait 1, 2, 4, ... up to ``most`` cycles between probes.

    Between probes only the fallback runs, and no check minibatches are spent. A win brings the
    learned lanes back into every cycle.

    Args:
        patience: losses running after which waits begin.
        most: the longest wait, in cycles.
        start: what a probe after a wait starts from: ``keep``, what the learned optimizer knew
            after its last probe, or ``reset``, what it knew when the guard was built.

    Raises:
        ValueError: if patience or most is below 1, or start is neither of the two.

    >>> rule, state = backoff(patience=2), ProbingState()
    >>> for probed in (True, True, False, True):
    ...     state = rule.update(state, probed, False)
    >>> state
    ProbingState(lost=3, wait=2, left=2)
    """
    patience, most = check_count("patience", patience), check_count("most", most)
    check_choice("start", start, get_args(Start))
    return Probing(partial(_back_off, patience=patience, most=most), start)


def _always(state: ProbingState, probed: bool, won: bool) -> ProbingState:
    return state


def _back_off(
    state: ProbingState, probed: bool, won: bool, *, patience: int, most: int
) -> ProbingState:
    if not probed:
        return state._replace(left=state.left - 1)
    lost = 0 if won else state.lost + 1
    wait = min(max(2 * state.wait, 1), most) if lost >= patience else 0
    return ProbingState(lost, wait, wait)
