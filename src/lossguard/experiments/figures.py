"""Figures and tables, made from records alone."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..curves import COUNTERS, last_step, mark_loss, over_seeds, step_mean
from ..drawing import log_losses, save, titled
from ..records import Record
from .lines import BANDS, LABELS, Over, guards, limits, lines

DASHES = ("-", "--", "-.", ":")
WIDTHS = 3.0, 0.9
"""Of the first line and the last, in points: what lies on another leaves it visible."""
LEGEND_WIDTH, LEGEND_SAMPLE = 120, 8
"""In letters: room for a line of the legend, and what a method needs beside its name."""
LEGEND_LINE = 0.17
"""Height in inches."""


def plot(folder: Path, record: Record, *, over: Over = "price") -> Path:
    """Draw a run's figure into its folder, as PNG; returns the file."""
    return save(draw_run(record, over), folder)


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
    line leaves the ``limits`` the axis ends there, and says so.
    """
    shown = lines(curves, seconds)
    tracks = {method: one.used for method, one in shown.items() if one.used is not None}
    columns = max(1, LEGEND_WIDTH // (LEGEND_SAMPLE + max(map(len, shown))))
    height = 5.5 + LEGEND_LINE * -(-len(shown) // columns)
    figure = Figure(figsize=(9, height), layout="constrained")
    heights = [5, 1] if tracks else [1]
    panels = figure.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=heights
    ).ravel()
    top, bottom = panels[0], panels[-1]
    for (method, one), width in zip(shown.items(), np.linspace(*WIDTHS, len(shown)), strict=True):
        x, style = one.at[over], {"color": f"C{one.color}", "linestyle": DASHES[one.dashes]}
        top.plot(x, one.mean, **style, linewidth=width, label=method)
        top.update_datalim([(x[0], 1), (x[-1], 1)], updatey=False)  # if no loss is finite
        if len(shown) <= BANDS:
            top.fill_between(x, one.low, one.high, color=style["color"], alpha=0.15, linewidth=0)
        if method in tracks:
            bottom.plot(x, 0.5 + 0.5 * tracks[method], **style, linewidth=1)
    top.set(xscale="log", ylabel="Training loss")
    log_losses(top)
    _cut(top, *limits(shown.values()))
    top.set_title(title, fontsize=10, parse_math=False)
    if tracks:
        bottom.set(ylim=(0.45, 1.05), ylabel="Led by")
        bottom.set_yticks([0.5, 1.0], ["fallback", "learned"])
    bottom.set_xlabel(LABELS[over])
    for axes in panels:
        axes.grid(which="major", alpha=0.3)
    legend = figure.legend(
        top.lines, [*shown], fontsize=8, loc="outside lower center", frameon=False, ncols=columns
    )  # given the names, else it leaves out what begins with _
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _cut(axes: Axes, low: float | None, high: float | None) -> None:
    """End the axis at the ``limits``, if lines leave there, and say so."""
    if not (low or high):
        return
    lowest, highest = low or axes.dataLim.minposy, high or axes.dataLim.y1
    margin = (highest / lowest) ** 0.05
    axes.set_ylim(lowest if low else lowest / margin, highest if high else highest * margin)
    ends = [f"the {end}" for end, limit in {"top": high, "bottom": low}.items() if limit]
    axes.set_ylabel(f"Training loss (lines leave at {' and '.join(ends)})")


def summary(record: Record) -> pl.DataFrame:
    """Losses at the marks, and what each method spent, as they are shown; a row a method.

    Whether one on its own is a learned optimizer is not in older records.
    """
    config, made, curves = record
    last = last_step(curves)
    steps = curves.group_by("method", "seed").agg(pl.col("step").max())
    steps = dict(steps.group_by("method").agg(pl.col("step").sum()).iter_rows())
    marks = [k for k in (100, 1_000, 10_000, 100_000, 1_000_000) if k < last] + [last]
    losses = {k: over_seeds(mark_loss(curves, k), "loss") for k in marks}
    final = curves.filter(pl.col("step") == pl.col("step").max().over("method"))
    spent = {name: over_seeds(final, name) for name in COUNTERS}
    used = over_seeds(step_mean(curves, "used_learned"), "used_learned")
    rows, guarded = [], guards(curves)
    for method in config["methods"]:
        seconds, guard = made["seconds"][method], method in guarded
        reached = {k: losses[k].get(method) for k in marks}
        counts = {name.replace("_", " "): f"{spent[name][method]:,.0f}" for name in COUNTERS}
        rows.append(
            {
                "method": method,
                **{
                    f"loss at {k:,}": "" if loss is None else f"{loss:.4g}"
                    for k, loss in reached.items()
                },
                "learned": f"{used[method]:.0%}" if guard else "",
                "seconds": f"{seconds:.3g}" if seconds < 10 else f"{seconds:,.0f}",
                "us a step": f"{1e6 * seconds / steps[method]:.0f}",
                **counts | ({} if guard else {"learned updates": ""}),
            }
        )
    return pl.DataFrame(rows)
