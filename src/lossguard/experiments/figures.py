"""Figures and tables, made from records alone."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ..curves import COUNTERS, PRICE, last_step, mark_loss, over_seeds, step_mean
from ..drawing import log_losses, save, titled
from ..records import Record

SMOOTHED_FROM = 300
"""Step from which the paper's figures are smoothed (caption of figure 3)."""
WINDOW = 0.1
"""Width of the moving window, as a share of the step."""
POINTS_A_DECADE = 100
"""Of a curve, that are drawn where it is smoothed."""
CEILING = 10
"""The loss axis ends at so many times the highest loss of the first step, if lines go beyond."""
FLOOR = 1e-8
"""And begins at so many times it, if lines reach 0: below, single precision rounds to 0 or not."""


Over = Literal["price", "seconds", "steps"]
"""What losses are drawn against."""
LABELS: Mapping[Over, str] = {
    "price": "Price: gradients, and a third for each forward pass",
    "seconds": "Seconds of one seed",
    "steps": "Optimizer step",
}


def plot(folder: Path, record: Record, *, over: Over = "price") -> Path:
    """Draw a run's figure into its folder, as PNG; returns the file.

    In the paper's style: log axes, a mean line and a min-max band for each method, and below, on
    axes of their own, whether loss guards used the learned update (1) or the fallback's (0.5). Of
    a grid of two settings it is a map of the losses at the end.
    """
    config, made, curves = record
    title = titled(config["title"] or config["name"], made["data"])
    heatmap = heatmap_of(config["methods"])
    if heatmap:
        return save(draw_heatmap(heatmap, curves, title), folder)
    return save(draw(curves, title, over=over, seconds=made["seconds"]), folder)


Place = Callable[[str, np.ndarray], np.ndarray]
"""Where on the axis a method was at steps [m]."""


def places(curves: pl.DataFrame, over: Over, seconds: Mapping[str, float]) -> Place:
    """Where methods were at their steps, the mean over seeds; seconds in proportion to the price.

    Args:
        curves: as ``curves.join`` makes them.
        over: the axis.
        seconds: of all seeds of each method together, for that axis.
    """
    priced = curves.with_columns(price=PRICE)

    def place(method: str, steps: np.ndarray) -> np.ndarray:
        if over == "steps":
            return steps
        own = priced.filter(pl.col("method") == method)
        mean = own.group_by("step").agg(pl.col("price").mean()).sort("step")
        prices = np.interp(steps, mean["step"].to_numpy(), mean["price"].to_numpy())
        if over == "price":
            return prices
        whole = float(own.group_by("seed").agg(pl.col("price").max())["price"].sum())
        return prices * seconds[method] / whole

    return place


def draw(
    curves: pl.DataFrame,
    title: str,
    *,
    over: Over = "steps",
    seconds: Mapping[str, float] | None = None,
) -> Figure:
    """The figure of an experiment's curves, as ``curves.join`` makes them.

    Lines are means over the seeds, each thinner than the one before, which it may lie on; bands
    reach from the least to the largest of them, if there are at most ``BANDS`` methods. Where a
    line goes beyond the ``ceiling`` or below the ``floor`` the axis ends there, and says so: what
    diverges, or is exactly 0, would flatten the others.
    """
    methods = curves["method"].unique(maintain_order=True).to_list()
    guarded = guards(curves)
    styles = {
        method: {
            "color": f"C{number % COLORS}",
            "linestyle": DASHES[number // COLORS % len(DASHES)],
        }
        for method, number in style_numbers(methods).items()
    }
    widths = np.linspace(*WIDTHS, len(methods))
    columns = max(1, LEGEND_WIDTH // (LEGEND_SAMPLE + max(map(len, methods))))
    height = 5.5 + LEGEND_LINE * -(-len(methods) // columns)
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(
        2 if guarded else 1,
        sharex=True,
        squeeze=False,
        height_ratios=[5, 1] if guarded else [1],
    )
    top, bottom, place = panels[0, 0], panels[-1, 0], places(curves, over, seconds or {})
    for (method, style), width in zip(styles.items(), widths, strict=True):
        style = style | {"linewidth": width}
        _draw_loss(top, curves, method, place, style, band=len(methods) <= BANDS)
    reach = np.array([curves["step"].min(), curves["step"].max()])
    ends = [(x, 1) for method in methods for x in place(method, reach)]
    top.update_datalim(ends, updatey=False)  # in case that no loss is finite
    top.set(xscale="log", ylabel="Training loss")
    log_losses(top)
    _cut(top, curves)
    top.set_title(title, fontsize=10, parse_math=False)
    if guarded:
        _draw_use(bottom, curves, place, {method: styles[method] for method in guarded})
    bottom.set_xlabel(LABELS[over])
    for axes in panels[:, 0]:
        axes.grid(which="major", alpha=0.3)
    legend = figure.legend(
        [next(line for line in top.lines if line.get_label() == m) for m in methods],
        methods,  # else it leaves out what begins with _
        fontsize=8,
        loc="outside lower center",
        frameon=False,
        ncols=columns,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def style_numbers(methods: Sequence[str]) -> dict[str, int]:
    """The number of each method's color and dashes: one of ``NAMED`` looks alike in all figures.

    A variant of one, such as "LGL2O (nc 100)" or "Adam 0.01", has its color, dashed.
    """
    numbers = [_number(method) for method in methods]
    if None in numbers or len({*numbers}) < len(methods):
        numbers = range(len(methods))
    return dict(zip(methods, numbers, strict=True))  # pyright: ignore[reportReturnType]


def _number(method: str) -> int | None:
    """Of one of ``NAMED`` or of a variant of it, if it is one."""
    plain = method.partition(" (")[0]
    bases = (plain, plain.rpartition(" ")[0])
    variant = next((NAMED[base] + COLORS for base in bases if base in NAMED), None)
    return NAMED.get(method, variant)


def guards(curves: pl.DataFrame) -> list[str]:
    """The methods that spend more than a gradient a step, on a second update or a check."""
    last = curves.filter(pl.col("step") == pl.col("step").max().over("method"))
    spent = last.filter(pl.col("gradients") + pl.col("forwards") > pl.col("step"))
    return spent["method"].unique(maintain_order=True).to_list()


def ceiling(curves: pl.DataFrame, lines: Sequence[np.ndarray]) -> float | None:
    """``CEILING`` times the highest loss of the first step, if one of these lines goes beyond."""
    drawn = np.concatenate(lines)
    limit = CEILING * _first(curves)
    return limit if 0 < limit < drawn.max(initial=0, where=np.isfinite(drawn)) else None


def floor(curves: pl.DataFrame, lines: Sequence[np.ndarray]) -> float | None:
    """``FLOOR`` times the highest loss of the first step, if one of these lines reaches 0."""
    limit = FLOOR * _first(curves)
    return limit if limit > 0 and (np.concatenate(lines) <= 0).any() else None


def _first(curves: pl.DataFrame) -> float:
    """The highest finite loss of the first step, 0 if there is none."""
    first = curves.filter(pl.col("step") == pl.col("step").min())["loss"].to_numpy()
    return float(first.max(initial=0, where=np.isfinite(first)))


BANDS = 5
"""Of more methods the bands would hide each other."""
WIDTHS = 3.0, 0.9
"""Of the first line and the last, in points: what lies on another leaves it visible."""
LEGEND_WIDTH, LEGEND_SAMPLE = 120, 8
"""In letters: room for a line of the legend, and what a method needs beside its name."""
LEGEND_LINE = 0.17
"""Height in inches."""
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
DASHES = ("-", "--", "-.", ":")
"""Of the first ten methods, the next ten, and so on: there are ten colors."""


def _draw_loss(
    axes: Axes,
    curves: pl.DataFrame,
    method: str,
    place: Place,
    style: dict[str, Any],
    *,
    band: bool,
) -> None:
    for steps, loss in _stretches(curves, method, "loss"):
        x = place(method, steps)
        axes.plot(x, loss.mean(axis=0), **style, label=method)
        if band:
            low, high = loss.min(axis=0), loss.max(axis=0)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _draw_use(
    axes: Axes, curves: pl.DataFrame, place: Place, styles: Mapping[str, dict[str, Any]]
) -> None:
    """Of each guard, whether it used the learned update (1) or the fallback's (0.5)."""
    for method, style in styles.items():
        for steps, used in _stretches(curves, method, "used_learned"):
            x, share = place(method, steps), (0.5 + 0.5 * used).mean(axis=0)
            axes.plot(x, share, **style, linewidth=1)
    axes.set(ylim=(0.45, 1.05), ylabel="use_l2o")
    axes.set_yticks([0.5, 1.0], ["fallback", "learned"])


def _stretches(
    curves: pl.DataFrame, method: str, column: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Steps [m] that are drawn, and a column smoothed [seeds, m], where the seeds are the same.

    There is more than one stretch only where some seeds of a method were taken further.
    """
    steps, values = by_seed(curves, method, column)
    ends = np.array([*ends_of(curves, method).values()])
    shown = np.union1d(drawn_points(steps), np.searchsorted(steps, ends))
    smoothed = smooth(steps, values)
    for begin, end in itertools.pairwise([0, *np.unique(ends)]):
        inside = shown[(steps[shown] > begin) & (steps[shown] <= end)]
        yield steps[inside], smoothed[ends >= end][:, inside]


def _cut(axes: Axes, curves: pl.DataFrame) -> None:
    """End the axis at the ``ceiling`` and the ``floor``, if lines leave there, and say so."""
    drawn = [np.asarray(line.get_ydata()) for line in axes.lines]
    low, high = floor(curves, drawn), ceiling(curves, drawn)
    if not (low or high):
        return
    lowest, highest = low or axes.dataLim.minposy, high or axes.dataLim.y1
    margin = (highest / lowest) ** 0.05
    axes.set_ylim(lowest if low else lowest / margin, highest if high else highest * margin)
    ends = [f"the {end}" for end, limit in {"top": high, "bottom": low}.items() if limit]
    axes.set_ylabel(f"Training loss (lines leave at {' and '.join(ends)})")


class Heatmap(NamedTuple):
    """Methods named "SGDnm RATE tau TAU", of each rate with each time scale."""

    name: str
    rates: list[str]
    taus: list[str]

    def losses(self, curves: pl.DataFrame) -> tuple[int, np.ndarray]:
        """The last step that all reached, and Loss there [rates, taus], the mean over seeds."""
        last = int(curves.group_by("method", "seed").agg(pl.col("step").max())["step"].min())  # pyright: ignore
        loss = over_seeds(mark_loss(curves, last), "loss")
        rows = [[loss[f"{self.name} {rate} tau {tau}"] for tau in self.taus] for rate in self.rates]
        return last, np.array(rows, float)


def heatmap_of(methods: Sequence[str]) -> Heatmap | None:
    """The grid that these methods are, if they are a whole one."""
    found = [re.fullmatch(r"(.+) (\S+) tau (\S+)", method) for method in methods]
    parts = [match.groups() for match in found if match]
    names, rates, taus = ([*dict.fromkeys(part[i] for part in parts)] for i in range(3))
    whole = len(names) == 1 and min(len(rates), len(taus)) > 1
    one = Heatmap(names[0], rates, taus) if whole else None
    return one if one and len(rates) * len(taus) == len(parts) == len(methods) else None


def draw_heatmap(heatmap: Heatmap, curves: pl.DataFrame, title: str) -> Figure:
    """A map of the losses at the last step that all reached, with the numbers."""
    last, losses = heatmap.losses(curves)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(losses), cmap="Blues", aspect="auto")
    middle = np.mean(image.get_clim())
    for (row, column), loss in np.ndenumerate(losses):
        color = "white" if loss > middle else "black"
        axes.text(column, row, f"{loss:#.4g}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(heatmap.taus)), heatmap.taus, parse_math=False)
    axes.set_yticks(range(len(heatmap.rates)), heatmap.rates, parse_math=False)
    axes.set_xlabel("Time scale of the decay, in steps")
    axes.set_ylabel(f"Rate of {heatmap.name}", parse_math=False)
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.colorbar(image, label=f"Training loss at step {last:,}")
    return figure


def drawn_points(steps: np.ndarray) -> np.ndarray:
    """Which of the steps [m] are drawn, as indices; the first ones and the last always are."""
    number = np.floor(POINTS_A_DECADE * np.log10(steps))
    last = np.append(number[1:] != number[:-1], True)
    return np.flatnonzero(last | (steps < SMOOTHED_FROM))


def ends_of(curves: pl.DataFrame, method: str) -> dict[int, int]:
    """The last step of each seed of a method, in the order of ``by_seed``."""
    ends = curves.filter(pl.col("method") == method).group_by("seed", maintain_order=True)
    return dict(ends.agg(pl.col("step").max()).iter_rows())


def by_seed(curves: pl.DataFrame, method: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps [m] of a method's bins, and a column [seeds, m], NaN beyond a seed's end."""
    wide = (
        curves.filter(pl.col("method") == method)
        .pivot("seed", index="step", values=column)
        .sort("step")
    )
    return wide["step"].to_numpy(), wide.drop("step").to_numpy().T


def smooth(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means over a moving window that ends at each step and grows with it, from step 300 on."""
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


def summary(record: Record) -> Table:
    """Losses at the marks, and what each method spent; of guards the learned updates.

    Whether one on its own is a learned optimizer is not in older records.
    """
    config, made, curves = record
    last = last_step(curves)
    steps = curves.group_by("method", "seed").agg(pl.col("step").max())
    steps = dict(steps.group_by("method").agg(pl.col("step").sum()).iter_rows())
    marks = [k for k in (100, 1_000, 10_000, 100_000, 1_000_000) if k < last] + [last]
    table = Table(title=config["title"] or config["name"], padding=0)
    table.add_column("method", no_wrap=True)
    for k in marks:
        table.add_column(f"loss at {k:,}", justify="right")
    for name in ("learned", "seconds", "us a step", *(name.replace("_", " ") for name in COUNTERS)):
        table.add_column(name, justify="right")
    losses = {k: over_seeds(mark_loss(curves, k), "loss") for k in marks}
    final = curves.filter(pl.col("step") == pl.col("step").max().over("method"))
    spent = {name: over_seeds(final, name) for name in COUNTERS}
    guarded = guards(curves)
    used = over_seeds(step_mean(curves, "used_learned"), "used_learned")
    for method in config["methods"]:
        seconds = made["seconds"][method]
        table.add_row(
            method,
            *(f"{losses[k][method]:.4g}" if method in losses[k] else "" for k in marks),
            f"{used[method]:.0%}" if method in guarded else "",
            f"{seconds:.3g}" if seconds < 10 else f"{seconds:,.0f}",
            f"{1e6 * seconds / steps[method]:.0f}",
            *(
                f"{spent[name][method]:,.0f}"
                if method in guarded or name != "learned_updates"
                else ""
                for name in COUNTERS
            ),
        )
    return table
