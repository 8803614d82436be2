"""What figures show of a run: each method's line, where on the axis it is, and how it looks."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import polars as pl

from ..curves import PRICE

SMOOTHED_FROM = 300
"""Step from which the paper's figures are smoothed (caption of figure 3)."""
WINDOW = 0.1
"""Width of the moving window, as a share of the step."""
POINTS_A_DECADE = 100
"""Of a line, that are drawn where it is smoothed."""
CEILING, FLOOR = 10, 1e-8
"""The loss axis ends at these times the highest loss of the first step, if lines go beyond or reach
0: they would flatten the others."""
BANDS = 5
"""Of more methods the bands would hide each other."""
Over = Literal["price", "seconds", "steps"]
"""What losses are drawn against."""
LABELS: Mapping[Over, str] = {
    "price": "Price: gradients, and a third for each forward pass",
    "seconds": "Seconds of one seed",
    "steps": "Optimizer step",
}


class Line(NamedTuple):
    """A column of a method's curves, each array [points]."""

    steps: np.ndarray
    mean: np.ndarray
    """Over the seeds that go on to the step; NaN where one of them is not finite."""
    low: np.ndarray
    """The least of them."""
    high: np.ndarray


def line(curves: pl.DataFrame, method: str, column: str) -> Line:
    """What is drawn of a column: smoothed, then thinned."""
    own = curves.filter(pl.col("method") == method).sort("seed")
    wide = own.pivot("seed", index="step", values=column).sort("step")
    ends = own.group_by("seed", maintain_order=True).agg(pl.col("step").max())["step"].to_numpy()
    steps, values = wide["step"].to_numpy(), wide.drop("step").to_numpy().T
    shown = np.union1d(drawn_points(steps), np.searchsorted(steps, ends))
    seeds = np.ma.masked_array(smooth(steps, values), mask=steps > ends[:, None])[:, shown]
    found = (seeds.mean(axis=0), seeds.min(axis=0), seeds.max(axis=0))
    return Line(steps[shown], *(np.ma.filled(one, np.nan) for one in found))


def smooth(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means over a moving window that ends at each step and grows with it, from step 300 on.

    Args:
        steps: [m], where bins end.
        values: [seeds, m], means over bins.
    """
    widths = np.diff(steps, prepend=0)
    first = np.where(
        steps < SMOOTHED_FROM,
        np.arange(len(steps)),
        np.searchsorted(steps, (1 - WINDOW) * steps, side="right"),
    )
    first = np.minimum(first, np.arange(len(steps)))
    # Not differences of running sums: in these, what comes after a huge loss is lost to rounding.
    windows = np.column_stack([first, np.arange(1, len(steps) + 1)]).ravel()
    sums, weights = (
        np.add.reduceat(np.append(rows, np.zeros((len(rows), 1)), axis=1), windows, axis=1)[:, ::2]
        for rows in (values * widths.astype(float), widths[None])
    )
    return np.where(np.isfinite(sums), sums / weights, np.nan)


def drawn_points(steps: np.ndarray) -> np.ndarray:
    """Which of the steps [m] are drawn, as indices; the first ones and the last always are."""
    number = np.floor(POINTS_A_DECADE * np.log10(steps))
    last = np.append(number[1:] != number[:-1], True)
    return np.flatnonzero(last | (steps < SMOOTHED_FROM))


def place(
    curves: pl.DataFrame, method: str, steps: np.ndarray, over: Over, seconds: Mapping[str, float]
) -> np.ndarray:
    """Where on the axis a method was at steps [m], the mean over seeds.

    Args:
        curves: as ``curves.join`` makes them.
        method: one of them.
        steps: some of its steps.
        over: the axis; seconds are in proportion to the price.
        seconds: of all seeds of each method together, for that axis.
    """
    if over == "steps":
        return steps
    own = curves.filter(pl.col("method") == method).with_columns(price=PRICE)
    mean = own.group_by("step").agg(pl.col("price").mean()).sort("step")
    prices = np.interp(steps, mean["step"].to_numpy(), mean["price"].to_numpy())
    if over == "price":
        return prices
    whole = float(own.group_by("seed").agg(pl.col("price").max())["price"].sum())
    return prices * seconds[method] / whole


def limits(curves: pl.DataFrame, losses: Sequence[np.ndarray]) -> tuple[float | None, float | None]:
    """Where the axis of these losses begins and ends, if lines reach 0 or go far beyond."""
    first = curves.filter(pl.col("step") == pl.col("step").min())["loss"].to_numpy()
    highest = float(first.max(initial=0, where=np.isfinite(first)))
    drawn = np.concatenate(losses)
    low, high = FLOOR * highest, CEILING * highest
    beyond = 0 < high < drawn.max(initial=0, where=np.isfinite(drawn))
    return low if low > 0 and (drawn <= 0).any() else None, high if beyond else None


def guards(curves: pl.DataFrame) -> list[str]:
    """The methods that spend more than a gradient a step, on a second update or a check."""
    last = curves.filter(pl.col("step") == pl.col("step").max().over("method"))
    spent = last.filter(pl.col("gradients") + pl.col("forwards") > pl.col("step"))
    return spent["method"].unique(maintain_order=True).to_list()


NAMED = {
    "SGDnm": 0,
    "LGL2O": 1,
    "Recommended": 2,
    "L2O": 3,
    "Adam": 4,
    "GL2O": 5,
    "GL2O (theta as decay)": 6,
    "LGL2O over Adam": 7,
    "Recommended over Adam": 8,
}
COLORS = 10


class Style(NamedTuple):
    """How a line looks; of the first ten the dashes are the first, of the next ten the next."""

    color: int
    """From 0 to 9."""
    dashes: int
    """From 0 to 3."""


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """Each method's: one of ``NAMED`` looks alike in all figures.

    A variant of one, such as "LGL2O (nc 100)" or "Adam 0.01", has its color, dashed.
    """
    numbers = [_number(method) for method in methods]
    if None in numbers or len({*numbers}) < len(methods):
        numbers = range(len(methods))
    found = zip(methods, numbers, strict=True)
    return {method: Style(n % COLORS, n // COLORS % 4) for method, n in found if n is not None}


def _number(method: str) -> int | None:
    """Of one of ``NAMED`` or of a variant of it, if it is one."""
    plain = method.partition(" (")[0]
    bases = (plain, plain.rpartition(" ")[0])
    variant = next((NAMED[base] + COLORS for base in bases if base in NAMED), None)
    return NAMED.get(method, variant)
