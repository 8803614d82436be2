"""Formulas over losses that claims are made of: each finds whether it holds, and says by how much.

Letters: m a method, k an optimizer step.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..curves import divided
from .evidence import MARKS, Figure, NotRunError

HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
}


class Finding(NamedTuple):
    """Whether a formula holds, and the numbers that say so."""

    holds: bool | None
    """None if it was not run."""
    numbers: str
    seeds: Mapping[int, int] = {}
    """How many at each mark."""


Of = Mapping[str, float]
"""Loss(m, k) by method."""
Formula = Callable[[Figure], Finding]


def at_marks(
    what: str,
    value: Callable[[Of], float],
    methods: Sequence[str],
    marks: Sequence[int],
    holds: str,
    bound: float,
    *,
    beyond: bool = False,
) -> Formula:
    """Whether a value of the losses keeps a bound at every mark: one that fails decides.

    Args:
        what: the value is.
        value: of the losses at a mark.
        methods: whose losses.
        marks: at which it is tested.
        holds: one of ``HOLDS``.
        bound: of the value.
        beyond: whether values at later marks are told, without being tested.
    """

    def formula(figure: Figure) -> Finding:
        if missing := [m for m in methods if not figure.has(m)]:
            raise NotRunError(f"no run has {', '.join(missing)}")
        later = [k for k in MARKS if beyond and k > marks[-1]]
        losses = {k: figure.losses(methods, k) for k in (*marks, *later) if reached(figure, k)}
        values = {k: value(one.of) for k, one in losses.items()}
        tested = {k: one for k, one in values.items() if k in marks}
        failed = [k for k, one in tested.items() if not HOLDS[holds](one, bound)]
        more = {k: one for k, one in values.items() if k in later}
        told = _told(tested, failed) + (f"; beyond: {_told(more, [])}" if more else "")
        all_hold = True if len(tested) == len(marks) else None
        seeds = {k: losses[k].seeds for k in tested}
        return Finding(False if failed else all_hold, f"{what}: {told}", seeds)

    def reached(figure: Figure, k: int) -> bool:
        return bool(figure.seeds(methods, k))

    return formula


def _told(values: Mapping[int, float], failed: Sequence[int]) -> str:
    """Three values one by one; of more the highest, the last, and where they fail first."""
    if len(values) <= 3:
        return ", ".join(f"{short(one)} at {k:,}" for k, one in values.items()) or "no mark"
    last, highest = max(values), max(values, key=lambda k: values[k])
    told = f"at most {short(values[highest])}, at {highest:,}"
    told += f"; {short(values[last])} at {last:,}" if last != highest else ""
    return told + (f"; fails at {failed[0]:,} first" if failed else "")


def ratio_of(
    method: str,
    others: Sequence[str],
    marks: Sequence[int],
    holds: str,
    bound: float,
    *,
    beyond: bool = False,
    what: str = "",
) -> Formula:
    """``at_marks`` of Loss(method, k) over the least of the others'."""
    best = others[0] if len(others) == 1 else f"the best of {', '.join(others)}"
    what = what or f"{method} over {best}"
    value = over(method, *others)
    return at_marks(what, value, [method, *others], marks, holds, bound, beyond=beyond)


def over(a: str, *b: str) -> Callable[[Of], float]:
    """Loss(a) over the least of the others."""
    return lambda of: divided(of[a], min(of[m] for m in b))


def rises(method: str, k: int, expected: bool) -> Formula:
    """Whether a method is above twice its least loss at step k; what lies beyond is told."""

    def formula(figure: Figure) -> Finding:
        ratio, seeds = figure.rise(method, k)
        later = [j for j in MARKS if j > k and figure.seeds([method], j)]
        more = [f"{short(figure.rise(method, j)[0])} at {j:,}" for j in later]
        numbers = f"{method} over its least so far: {short(ratio)} at {k:,}"
        numbers += f"; beyond: {', '.join(more)}" if more else ""
        return Finding((ratio > 2) == expected, numbers, {k: seeds})

    return formula


def from_first(method: str, k: int, bound: float, *, or_rises: bool = False) -> Formula:
    """Whether Loss(method, k) over its first loss is above a bound, or it rises by k."""

    def formula(figure: Figure) -> Finding:
        ratio, seeds = figure.over_first(method, k)
        passes = ratio > bound or (or_rises and figure.rise(method, k)[0] > 2)
        return Finding(passes, f"{method} at {k:,} over its first loss: {short(ratio)}", {k: seeds})

    return formula


def each(*formulas: Formula) -> Formula:
    """All of them: one that fails decides, then one that was not run."""

    def formula(figure: Figure) -> Finding:
        return all_of(found(lambda one=one: one(figure)) for one in formulas)

    return formula


def all_of(findings: Iterable[Finding]) -> Finding:
    """The same of findings."""
    several = list(findings)
    outcomes = {one.holds for one in several}
    return together(False if False in outcomes else None if None in outcomes else True, several)


def either(methods: Sequence[str], formula: Callable[[str], Formula]) -> Formula:
    """By one of these methods at least, of those that were run."""

    def judge(figure: Figure) -> Finding:
        run = [method for method in methods if figure.has(method)]
        if not run:
            raise NotRunError(f"no run has {methods[0]}")
        several = [found(lambda one=one: formula(one)(figure)) for one in run]
        outcomes = {one.holds for one in several}
        return together(True if True in outcomes else False if False in outcomes else None, several)

    return judge


def found(judge: Callable[[], Finding]) -> Finding:
    """What a judge finds; None holds if it needs what was not run."""
    try:
        return judge()
    except NotRunError as error:
        return Finding(None, str(error))


def together(holds: bool | None, several: Sequence[Finding]) -> Finding:
    """Several as one, which holds or not; at a mark the fewest seeds count."""
    seeds: dict[int, int] = {}
    for one in several:
        for k, count in one.seeds.items():
            seeds[k] = min(count, seeds.get(k, count))
    return Finding(holds, "; ".join(one.numbers for one in several), seeds)


def short(value: float) -> str:
    """Two significant digits.

    >>> [short(value) for value in (0.0149, 4715.0, 23_499.0)]
    ['0.015', '4700', '2.3e4']
    """
    if not math.isfinite(value):
        return "inf"
    rounded = float(f"{value:.1e}")
    if rounded == 0 or 1e-3 <= rounded < 1e4:
        return f"{rounded:g}"
    digits, _, power = f"{rounded:.1e}".partition("e")
    return f"{digits}e{int(power)}"
