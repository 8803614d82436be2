"""Figures and tables, made from records alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..runs.curves import COUNTERS, PRICE, mark_loss, over_seeds, step_mean
from ..runs.drawing import log_losses, titled
from ..runs.records import Record

SMOOTHED_FROM = 300
"""Step from which the paper's figures are smoothed (caption of figure 3)."""
WINDOW = 0.1
"""Width of the window that is averaged, as a share of the step."""
CEILING, FLOOR = 10, 1e-8
"""The loss axis ends at these times the highest loss of the first step, if lines go beyond or reach
0: they would flatten the others."""
BANDS = 9
"""Of more methods the bands would hide each other."""
Over = Literal["price", "seconds", "steps"]
"""What losses are drawn against."""
LABELS: Mapping[Over, str] = {
    "price": "Price: gradients, and a third for each forward pass",
    "seconds": "Seconds of one seed, in proportion to the price",
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
    "GL2O (every step)",
    "LGL2O over Adam",
    "Recommended over Adam",
)
"""Methods that have a color of their own, the same in all figures of these alone."""
COLORS = 10
DASHES = ("-", "--", "-.", ":")
WIDTHS = 3.0, 0.9
"""Of the first line and the last, in points: what lies on another leaves it visible."""
LEGEND_WIDTH, LEGEND_SAMPLE = 120, 8
"""In letters: room for a line of the legend, and what a method needs beside its name."""
LEGEND_LINE = 0.17
"""Height in inches."""
MILLI = 1_000
"""Seconds are looked up in thousandths."""
LAST = pl.col("step") == pl.col("step").max().over("method")
"""The rows in which a method ends."""


def draw_run(record: Record, over: Over = "price") -> Figure:
    """A run's figure, in the paper's style.

    Log axes, a mean line and a min-max band for each method, and below, on axes of their own,
    whether loss guards used the learned update (1) or the fallback's (0.5).
    """
    title = titled(record.config["title"] or record.config["name"], record.manifest["data"])
    return draw(record.curves, title, over, record.manifest["seconds"])


def draw(
    curves: pl.DataFrame,
    title: str,
    over: Over = "steps",
    seconds: Mapping[str, float] | None = None,
) -> Figure:
    """The figure of an experiment's curves, as ``curves.join`` makes them.

    Lines are means over the seeds, each thinner than the one before, which it may lie on; bands
    reach from the least to the largest of them, if there are at most ``BANDS`` methods. Where a
    line goes far beyond the first losses, or to 0, the axis ends, and says so.
    """
    points, guarded = lines(curves, over, seconds), guards(curves.filter(LAST))
    looks = styles(curves["method"].unique(maintain_order=True).to_list())
    columns = max(1, LEGEND_WIDTH // (LEGEND_SAMPLE + max(map(len, looks))))
    height = 5.5 + LEGEND_LINE * -(-len(looks) // columns)
    figure = Figure(figsize=(9, height), layout="constrained")
    heights = [5, 1] if guarded else [1]
    panels = figure.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=heights
    ).ravel()
    top, bottom = panels[0], panels[-1]
    for (method, style), width in zip(looks.items(), np.linspace(*WIDTHS, len(looks)), strict=True):
        own = {one.name: one.to_numpy() for one in points.filter(method=method)}
        x, look = own["x"], {"color": style[0], "linestyle": style[1]}
        top.plot(x, own["loss"], **look, linewidth=width, label=method)
        top.update_datalim([(x[0], 1), (x[-1], 1)], updatey=False)  # if no loss is finite
        if len(looks) <= BANDS:
            top.fill_between(x, own["low"], own["high"], color=style[0], alpha=0.15, linewidth=0)
        if method in guarded:
            bottom.plot(x, 0.5 + 0.5 * own["used_learned"], **look, linewidth=1)
    top.set(xscale="log", ylabel="Training loss")
    log_losses(top)
    _cut(top, points)
    top.set_title(title, fontsize=min(10, 900 / max(len(title), 1)), parse_math=False)
    if guarded:
        bottom.set(ylim=(0.45, 1.05), ylabel="Led by")
        bottom.set_yticks([0.5, 1.0], ["fallback", "learned"])
    bottom.set_xlabel(LABELS[over])
    for axes in panels:
        axes.grid(which="major", alpha=0.3)
    legend = figure.legend(
        top.lines, [*looks], fontsize=8, loc="outside lower center", frameon=False, ncols=columns
    )  # given the names, else it leaves out what begins with _
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def lines(
    curves: pl.DataFrame, over: Over, seconds: Mapping[str, float] | None = None
) -> pl.DataFrame:
    """The points of each method's line, by step.

    Up to step 300 every step is drawn. After it, steps a tenth apart down from the last one are,
    each with the mean over the steps since the one before.

    Columns: ``method``; ``step``; ``x``, where on the axis it is, the mean over seeds; ``loss``,
    the mean over the seeds that go on to the step, NaN where one of them is not finite; ``low`` and
    ``high``, the least and the largest of them; ``used_learned``, the share of learned steps.

    Args:
        curves: as ``curves.join`` makes them.
        seconds: of all seeds of each method together, for that axis: in proportion to the price.
    """
    loss, price = pl.col("loss"), pl.col("price")
    x = axis(curves, over, seconds, price)
    return (
        _windows(curves)
        .group_by("method", "step")
        .agg(
            price.mean(),
            loss.mean(),
            pl.col("used_learned").mean(),
            low=loss.nan_min(),
            high=loss.nan_max(),
        )
        .with_columns(x=x)
        .sort("step")
    )


def axis(
    curves: pl.DataFrame, over: Over, seconds: Mapping[str, float] | None, price: pl.Expr
) -> pl.Expr:
    """Where points are on an axis, of methods whose ``curves`` and ``seconds`` are these."""
    spent = curves.group_by("method", "seed").agg(price=PRICE.max())
    spent = spent.group_by("method").agg(pl.col("price").sum())
    rates = {
        m: (seconds or {}).get(m, math.nan) / (whole or math.nan) for m, whole in spent.iter_rows()
    }
    of_price = price * pl.col("method").replace_strict(rates)
    return {"price": price, "seconds": of_price, "steps": pl.col("step")}[over]


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


def _cut(axes: Axes, points: pl.DataFrame) -> None:
    """End the axis where lines reach 0 or go far beyond the first losses, and say so."""
    first = points.group_by("method").agg(pl.col("high").first())["high"].to_numpy()
    top, losses = first.max(initial=0, where=np.isfinite(first)), points["loss"].to_numpy()
    low = FLOOR * top if (losses <= 0).any() else 0
    high = CEILING * top if CEILING * top < losses.max(initial=0, where=np.isfinite(losses)) else 0
    if not (low or high):
        return
    lowest, highest = low or axes.dataLim.minposy, high or axes.dataLim.y1
    margin = (highest / lowest) ** 0.05
    axes.set_ylim(lowest if low else lowest / margin, highest if high else highest * margin)
    ends = [f"the {end}" for end, limit in {"top": high, "bottom": low}.items() if limit]
    axes.set_ylabel(f"Training loss (lines leave at {' and '.join(ends)})")


def guards(final: pl.DataFrame) -> list[str]:
    """The methods that spent more than a gradient a step, on a second update or a check."""
    spent = final.filter(pl.col("gradients") + pl.col("forwards") > pl.col("step"))
    return spent["method"].unique(maintain_order=True).to_list()


def styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and dashes of each: one of ``NAMED`` looks alike in all figures.

    A variant of one, such as "LGL2O (nc 100)" or "Adam 0.01", has its color, dashed. Where a method
    is neither, or two look alike, they are numbered.
    """
    looks = [_look(method) for method in methods]
    if None in looks or len({*looks}) < len(methods):
        looks = [(f"C{k % COLORS}", DASHES[k // COLORS % 4]) for k in range(len(methods))]
    return dict(zip(methods, looks, strict=True))  # pyright: ignore[reportReturnType]


def _look(method: str) -> tuple[str, str] | None:
    plain = method.partition(" (")[0]
    for dashes, name in enumerate((method, plain, plain.rpartition(" ")[0])):
        if name in NAMED:
            return f"C{NAMED.index(name)}", DASHES[min(dashes, 1)]
    return None


def summary(record: Record, over: Over = "price") -> pl.DataFrame:
    """Losses at the marks, and what each method spent, as they are shown; a row a method.

    Marks are powers of ten, and the end; for price and seconds that to which all methods get.
    """
    config, made, curves = record
    ends = pl.col("step").max().over("method", "seed")
    unit = MILLI if over == "seconds" else 1
    at = curves.with_columns(step=(unit * axis(curves, over, made["seconds"], PRICE)).round(6))
    reached = at.group_by("method", "seed").agg(pl.col("step").max())["step"].to_numpy()
    last = int(reached.max() if over == "steps" else reached.min())
    marks = sorted({10**n for n in range(2, 7) if 10**n <= reached.max()} | {last})
    losses = {k: over_seeds(mark_loss(at.filter(ends >= k), k), "loss") for k in marks}
    used = over_seeds(step_mean(curves, "used_learned"), "used_learned")
    steps = dict(curves.filter(step=ends).group_by("method").agg(pl.col("step").sum()).iter_rows())
    seconds = {method: made["seconds"][method] for method in used}
    spent = {name: over_seeds(curves.filter(LAST), name) for name in COUNTERS}
    told = {k: f"{k / MILLI:g} s" if over == "seconds" else f"{k:,}" for k in marks}
    columns = {f"loss at {told[k]}": ("{:.4g}", of) for k, of in losses.items()} | {
        "learned": ("{:.0%}", used),
        "seconds": ("{}", {m: f"{s:.3g}" if s < 10 else f"{s:,.0f}" for m, s in seconds.items()}),
        "us a step": ("{:.0f}", {m: 1e6 * s / steps[m] for m, s in seconds.items()}),
        **{name.replace("_", " "): ("{:,.0f}", of) for name, of in spent.items()},
    }
    methods = sorted(used, key=[*config["methods"], *used].index)
    cells = {
        name: [form.format(of[method]) if method in of else "" for method in methods]
        for name, (form, of) in columns.items()
    }
    return pl.DataFrame({"method": methods} | cells)
