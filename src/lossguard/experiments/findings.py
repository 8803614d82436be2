"""What a formula over losses finds in a run: it holds, it fails, or the run doesn't reach that far.

Letters: m a method, k an optimizer step, K the last one of a run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .evidence import Run, marks

Losses = Mapping[str, float]
"""Loss(m, k) by method, infinite where it is not finite."""


class Finding(NamedTuple):
    """Whether a formula holds, and the numbers that say so."""

    holds: bool | None
    """None if it was not run."""
    measured: str
    folder: Path | None = None
    """Of the run that says so, if it is one."""


def all_of(*findings: Finding) -> Finding:
    """All of them: fails if one fails, else not run if one was not run."""
    outcomes = [finding.holds for finding in findings]
    holds = False if False in outcomes else None if None in outcomes else True
    return Finding(holds, "; ".join(finding.measured for finding in findings))


def at(run: Run, k: int, test: Callable[[Losses], bool], methods: Sequence[str]) -> Finding:
    """What a test says of the losses at step k."""
    if run.last < k:
        return Finding(None, f"step {k:,} was not reached, the last one is {run.last:,}")
    losses = run.losses(k)
    numbers = ", ".join(f"{method} {losses[method]:.3g}" for method in methods)
    return Finding(test(losses), f"{numbers} at step {k:,}")


def at_end(run: Run, test: Callable[[Losses], bool], methods: Sequence[str]) -> Finding:
    """What a test says of the losses at step K, which is the paper's or a later one."""
    return at(run, max(run.last, run.full_length), test, methods)


def at_marks(
    run: Run,
    wanted: Sequence[int],
    ratio: Callable[[int], float],
    holds: Callable[[float], bool],
    what: str,
) -> Finding:
    """What a test says of a ratio at every mark; the worst is the largest.

    One that fails decides. If none does, it holds only if all marks were reached.
    """
    reached = [k for k in wanted if k <= run.last]
    if not reached:
        return Finding(None, f"the last step is {run.last:,}, before the first mark")
    ratios = {k: ratio(k) for k in reached}
    worst = max(reached, key=lambda k: ratios[k])
    failed = [k for k in reached if not holds(ratios[k])]
    missing = ", not to " + f"{wanted[-1]:,}" if len(reached) < len(wanted) else ""
    first = f", fails first at {failed[0]:,}" if failed else ""
    return Finding(
        False if failed else None if missing else True,
        f"{what} is {ratios[worst]:.3g} at worst, at step {worst:,}{first} "
        f"(checked to {reached[-1]:,}{missing})",
    )


def as_good_as_its_parts(run: Run, wanted: Sequence[int]) -> Finding:
    """Loss(LGL2O, k) <= 1.1 min(Loss(L2O, k), Loss(SGDnm, k)) at these marks."""
    return at_marks(run, wanted, lambda k: over_parts(run.losses(k)), lambda r: r <= 1.1, OVER)


OVER = "LGL2O over the better of its parts"


def over_parts(losses: Losses) -> float:
    """Loss(LGL2O, k) / min(Loss(L2O, k), Loss(SGDnm, k))."""
    return divided(losses["LGL2O"], min(losses["L2O"], losses["SGDnm"]))


def tracks(run: Run, method: str, other: str) -> Finding:
    """Within 5 % at every mark."""

    def distance(k: int) -> float:
        losses = run.losses(k)
        return abs(divided(losses[method], losses[other]) - 1)

    what = f"the distance of {method} from {other}, relative to it,"
    return at_marks(run, every_mark(run), distance, lambda d: d <= 0.05, what)


def diverges(run: Run, method: str) -> Finding:
    """Loss(m, K) > 2 min_k Loss(m, k), or not finite; k is 1 or a mark or K."""
    if run.last < run.full_length:
        return Finding(None, f"{method} was not run to step {run.full_length:,}")
    rise = over_least(run, method, run.last)
    return Finding(rise > 2, f"{method} ends at {rise:.3g} times its least loss")


def over_least(run: Run, method: str, k: int) -> float:
    """Loss(m, k) over its least at step 1, a mark or k, whichever has been by then."""
    least = min(run.losses(j)[method] for j in (1, *marks(k), k))
    return divided(run.losses(k)[method], least)


def every_mark(run: Run) -> list[int]:
    """The marks up to K, and to the recipe's length if the run is shorter."""
    return marks(max(run.last, run.full_length))


def divided(a: float, b: float) -> float:
    """a / b, where a loss that is not finite is infinitely worse than any, its like included."""
    if not math.isfinite(a) or (b == 0 and a > 0):
        return math.inf
    return 1.0 if a == b else a / b
