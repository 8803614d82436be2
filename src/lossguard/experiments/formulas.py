"""Formulas that claims are made of: each finds whether it holds, and says by how much.

Letters: m a method, k an optimizer step.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import polars as pl

from .evidence import MARKS, Evidence, FigureCurves, NotRunError, interval, mean_losses

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


Formula = Callable[[FigureCurves], Finding]


class Measured(NamedTuple):
    """A value at step k."""

    value: float
    seeds: int
    """Of how many seeds it is."""
    interval: Callable[[], tuple[float, float]] | None = None
    """Computes its 95 % interval over them."""


Value = Callable[[FigureCurves, int], Measured]
"""This and a formula raise ``NotRunError``."""


def values(figure: FigureCurves, value: Value, steps: Iterable[int]) -> dict[int, Measured]:
    """A value at those of these steps that were reached."""
    reached = {}
    for k in steps:
        with suppress(NotRunError):
            reached[k] = value(figure, k)
    return reached


def at_marks(
    what: str, value: Value, marks: Sequence[int], holds: str, bound: float, *, beyond: bool = False
) -> Formula:
    """Whether a value keeps a bound at every mark: one that fails decides.

    ``holds`` is one of ``HOLDS``; ``beyond`` tells values at later marks, without testing them.
    """

    def formula(figure: FigureCurves) -> Finding:
        tested = values(figure, value, marks) or {marks[0]: value(figure, marks[0])}
        later = values(figure, value, (k for k in MARKS if beyond and k > marks[-1]))
        failed = [k for k, one in tested.items() if not HOLDS[holds](one.value, bound)]
        told = _told(tested, failed, bound) + (f"; beyond: {_told(later, [])}" if later else "")
        outcome = False if failed else True if len(tested) == len(marks) else None
        return Finding(outcome, f"{what}: {told}", {k: one.seeds for k, one in tested.items()})

    return formula


def _told(values: Mapping[int, Measured], failed: Sequence[int], bound: float = math.nan) -> str:
    """Three values one by one; of more the highest, the last, and where they fail first."""
    if len(values) <= 3:
        return ", ".join(f"{number(one, bound)} at {k:,}" for k, one in values.items())
    highest, end = max(values, key=lambda k: values[k].value), max(values)
    last = f"; {number(values[end], bound)} at {end:,}" if highest != end else ""
    fails = f"; fails at {failed[0]:,} first" if failed else ""
    return f"at most {number(values[highest], bound)}, at {highest:,}{last}{fails}"


def number(one: Measured, bound: float) -> str:
    """A value, and its interval if the bound is in it: other seeds might decide otherwise."""
    if one.interval is not None and one.seeds > 1 and not math.isnan(bound):
        low, high = one.interval()
        if low <= bound <= high and short(low) != short(high):
            return f"{short(one.value)} ({short(low)} to {short(high)})"
    return short(one.value)


def of_losses(expression: pl.Expr, earlier: Sequence[int] = ()) -> Value:
    """Of columns of losses by method, at earlier steps and, in the last row, at step k."""
    methods = [*dict.fromkeys(expression.meta.root_names())]

    def value(figure: FigureCurves, k: int) -> Measured:
        each = figure.of_seeds(methods, k, earlier)
        found = mean_losses(each).select(expression)[-1].item()
        return Measured(found, each["seed"].n_unique(), lambda: interval(each, expression))

    return value


def divided(a: pl.Expr, b: pl.Expr) -> pl.Expr:
    """a / b, where a loss that is not finite is infinitely worse than any, its like included."""
    equal = a.is_finite() & (a == b)
    return pl.when(equal).then(1.0).otherwise(a / b).fill_nan(math.inf)


def over(a: str, *b: str) -> pl.Expr:
    """Loss(a) over the least of the others."""
    return divided(pl.col(a), pl.min_horizontal(*b))


def rise(method: str) -> Value:
    """Loss(m, k) over its least at a mark up to k."""
    return of_losses(divided(pl.col(method), pl.col(method).min()), MARKS)


def ratio(
    a: str, b: Sequence[str], marks: Sequence[int], holds: str, bound: float, **more: bool
) -> Formula:
    """``at_marks`` of Loss(a) over the least of the others'."""
    best = b[0] if len(b) == 1 else f"the best of {', '.join(b)}"
    return at_marks(f"{a} over {best}", of_losses(over(a, *b)), marks, holds, bound, **more)


def rises(method: str, k: int, holds: str = ">") -> Formula:
    """Whether a method is above twice its least loss at step k, or with "<=" isn't."""
    return at_marks(f"{method} over its least", rise(method), [k], holds, 2, beyond=True)


def from_first(method: str) -> Value:
    """Loss(m, k) over the loss at step 1."""
    return of_losses(divided(pl.col(method), pl.col(method).first()), [1])


def each(*formulas: Formula) -> Formula:
    """All of them: one that fails decides, then one that was not run."""
    return lambda figure: together(found(one, figure) for one in formulas)


def either(methods: Sequence[str], formula: Callable[[str], Formula]) -> Formula:
    """By one of these methods at least, of those that were run; then only such are told."""

    def judge(figure: FigureCurves) -> Finding:
        several = [found(formula(m), figure) for m in figure.run(methods)]
        return together([one for one in several if one.holds] or several)

    return judge


def on(number: int, *formulas: Formula) -> Callable[[Evidence], Finding]:
    """All of several formulas on the curves of a figure."""

    def judge(evidence: Evidence) -> Finding:
        if (name := f"fig{number:02}") not in evidence.figures:
            raise NotRunError(f"no run of {name}")
        return each(*formulas)(evidence.figures[name])

    return judge


def on_each(numbers: Sequence[int], formula: Formula) -> Callable[[Evidence], Finding]:
    """On each of several figures."""

    def judge(evidence: Evidence) -> Finding:
        several = {n: found(on(n, formula), evidence) for n in numbers}
        told = (one._replace(numbers=f"fig{n:02}: {one.numbers}") for n, one in several.items())
        return together(told)

    return judge


def found(judge: Callable[[Any], Finding], what: Any) -> Finding:
    """What a judge finds, not run if it needs what was not."""
    try:
        return judge(what)
    except NotRunError as error:
        return Finding(None, str(error))


def together(findings: Iterable[Finding]) -> Finding:
    """Several as one: one that fails decides, then one not run. Fewest seeds at a mark count."""
    several, seeds = list(findings), {}
    for k, count in (item for one in several for item in one.seeds.items()):
        seeds[k] = min(count, seeds.get(k, count))
    holds = min((one.holds for one in several), key=(False, None, True).index)
    return Finding(holds, "; ".join(one.numbers for one in several), seeds)


def short(value: float) -> str:
    """Two significant digits."""
    if not math.isfinite(value):
        return "inf"
    rounded = float(f"{value:.1e}")
    if rounded == 0 or 1e-3 <= rounded < 1e4:
        return f"{rounded:g}"
    digits, _, power = f"{rounded:.1e}".partition("e")
    return f"{digits}e{int(power)}"
