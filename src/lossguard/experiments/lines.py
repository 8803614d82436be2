"""What figures show of a run: each method's line, where on the axis it is, and how it looks."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import polars as pl

from ..curves import PRICE

SMOOTHED_FROM = 300
"""Step from which the paper's figures are smoothed (caption of figure 3)."""
WINDOW = 0.1
"""Width of the window that is averaged, as a share of the step."""
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
NAMED = (
    "SGDnm",
    "LGL2O",
    "Recommended",
    "L2O",
    "Adam",
    "GL2O",
    "GL2O (theta as decay)",
    "LGL2O over Adam",
    "Recommended over Adam",
)
"""Methods that have a color of their own, the same in all figures."""
COLORS = 10


class Line(NamedTuple):
    """What is drawn of a method, each array [points]."""

    at: Mapping[Over, np.ndarray]
    """Where on each axis, the mean over seeds; seconds are in proportion to the price."""
    mean: np.ndarray
    """Over the seeds that go on to the step; NaN where one of them is not finite."""
    low: np.ndarray
    """The least of them."""
    high: np.ndarray
    used: np.ndarray | None
    """Share of learned steps, of a guard: it spends more than a gradient a step."""
    color: int
    """From 0 to 9."""
    dashes: int
    """From 0 to 3."""


def lines(curves: pl.DataFrame, seconds: Mapping[str, float] | None = None) -> dict[str, Line]:
    """Each method's line.

    Up to step 300 every step is drawn. After it, steps a tenth apart down from the last one are,
    each with the mean over the steps since the one before.

    Args:
        curves: as ``curves.join`` makes them.
        seconds: of all seeds of each method together, for that axis.
    """
    windows, loss, price = _windows(curves), pl.col("loss"), pl.col("price")
    spent = curves.group_by("method", "seed").agg(price=PRICE.max())
    spent = spent.group_by("method").agg(price.sum())
    rates = {m: (seconds or {}).get(m, math.nan) / whole for m, whole in spent.iter_rows()}
    points = (
        windows.group_by("method", "step")
        .agg(
            price.mean(),
            loss.mean(),
            pl.col("used_learned").mean(),
            loss.nan_min().alias("low"),
            loss.nan_max().alias("high"),
        )
        .with_columns(seconds=price * pl.col("method").replace_strict(rates))
        .sort("step")
    )
    methods, guarded = curves["method"].unique(maintain_order=True).to_list(), guards(curves)
    looks, found = styles(methods), {}
    for method in methods:
        own = {one.name: one.to_numpy() for one in points.filter(method=method)}
        at: dict[Over, np.ndarray]
        at = {"price": own["price"], "seconds": own["seconds"], "steps": own["step"]}
        used = own["used_learned"] if method in guarded else None
        found[method] = Line(at, own["loss"], own["low"], own["high"], used, *looks[method])
    return found


def _windows(curves: pl.DataFrame) -> pl.DataFrame:
    """Of each method, seed and window: its last step, the price by then, and means over it.

    Without those of a seed that ends inside, if others go on.
    """
    step, width, both = pl.col("step"), pl.col("width"), ("method", "seed")
    down = (step.max().over("method") / step).log() / -math.log(1 - WINDOW)
    number = (down + 1e-9).floor()  # a step on an edge ends its window
    means = (pl.col("loss", "used_learned").cast(pl.Float64) * width).sum() / width.sum()
    return (
        curves.with_columns(
            price=PRICE,
            width=step - step.shift(1, fill_value=0).over(both),
            window=pl.when(step < SMOOTHED_FROM).then(step).otherwise(-1 - number),
        )
        .group_by(*both, "window", maintain_order=True)
        .agg(pl.col("step", "price").max(), means)
        .filter(step == step.max().over("method", "window"))
        .with_columns(pl.when(pl.col("loss").is_finite()).then("loss").otherwise(math.nan))
    )


def limits(drawn: Collection[Line]) -> tuple[float | None, float | None]:
    """Where the axis of losses begins and ends, if lines reach 0 or go far beyond."""
    first = np.array([line.high[0] for line in drawn])
    highest = float(first.max(initial=0, where=np.isfinite(first)))
    losses = np.concatenate([line.mean for line in drawn])
    low, high = FLOOR * highest, CEILING * highest
    beyond = 0 < high < losses.max(initial=0, where=np.isfinite(losses))
    return low if low > 0 and (losses <= 0).any() else None, high if beyond else None


def guards(curves: pl.DataFrame) -> list[str]:
    """The methods that spend more than a gradient a step, on a second update or a check."""
    last = curves.filter(pl.col("step") == pl.col("step").max().over("method"))
    spent = last.filter(pl.col("gradients") + pl.col("forwards") > pl.col("step"))
    return spent["method"].unique(maintain_order=True).to_list()


def styles(methods: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Color and dashes of each: one of ``NAMED`` looks alike in all figures.

    A variant of one, such as "LGL2O (nc 100)" or "Adam 0.01", has its color, dashed. Where a method
    is neither, or two look alike, they are numbered.
    """
    looks = [_look(method) for method in methods]
    if None in looks or len({*looks}) < len(methods):
        looks = [(k % COLORS, k // COLORS % 4) for k in range(len(methods))]
    return dict(zip(methods, looks, strict=True))  # pyright: ignore[reportReturnType]


def _look(method: str) -> tuple[int, int] | None:
    plain = method.partition(" (")[0]
    for dashes, name in enumerate((method, plain, plain.rpartition(" ")[0])):
        if name in NAMED:
            return NAMED.index(name), min(dashes, 1)
    return None
