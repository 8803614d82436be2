"""Figures and tables, made from records alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ..records import COUNTERS, mark_loss, read_run

SMOOTHED_FROM = 300
"""Step from which the paper's figures are smoothed (caption of figure 3)."""
WINDOW = 0.1
"""Width of the moving window, as a share of the step."""


def plot(folder: Path, *, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw a run's figure into its folder; returns the files.

    In the paper's style: log axes, a mean line and a min-max band for each method, and on a second
    axis whether the loss guard used the learned update (1) or the fallback's (0.5).
    """
    config, made, curves = read_run(folder)
    figure = draw(curves, config["title"] or config["name"], note=made["data"])
    files = [folder / f"figure.{ending}" for ending in formats]
    for file in files:
        figure.savefig(file, dpi=150)
    plt.close(figure)
    return files


def draw(curves: pl.DataFrame, title: str, *, note: str = "") -> Figure:
    """The figure of an experiment's curves, as ``records.join`` makes them."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    methods = curves["method"].unique(maintain_order=True).to_list()
    colors = [f"C{number}" for number in range(len(methods))]  # from the eleventh on again
    for method, color in zip(methods, colors, strict=True):
        steps, loss = by_seed(curves, method, "loss")
        loss = smooth(steps, loss)
        axes.plot(steps, loss.mean(axis=0), color=color, label=method, linewidth=1.3)
        axes.fill_between(steps, loss.min(axis=0), loss.max(axis=0), color=color, alpha=0.2, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="Optimizer step", ylabel="Loss")
    axes.set_title(title + (f" ({note})" if note else ""), fontsize=10)
    axes.grid(which="major", alpha=0.3)
    _draw_use(axes, curves, methods, colors)
    axes.legend(fontsize=8, loc="lower left")
    return figure


def _draw_use(axes: Axes, curves: pl.DataFrame, methods: list[str], colors: list[str]) -> None:
    checked = curves.filter(pl.col("forwards") > 0)["method"].unique().to_list()
    guarded = [m for m in methods if m in checked]
    if not guarded:
        return
    second = axes.twinx()
    for method in guarded:
        steps, used = by_seed(curves, method, "used_learned")
        use_l2o = smooth(steps, 0.5 + 0.5 * used).mean(axis=0)
        second.plot(steps, use_l2o, ":", color=colors[methods.index(method)], linewidth=1)
    second.set(ylim=(0.45, 1.55), yticks=[0.5, 1.0], ylabel="use_l2o (dotted)")
    axes.set_zorder(second.get_zorder() + 1)
    axes.patch.set_visible(False)


def by_seed(curves: pl.DataFrame, method: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps [m] of a method's bins, and a column's values [seeds, m]."""
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
    weights = np.concatenate([[0.0], np.cumsum(widths)])
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0) * widths, axis=1)
    sums = np.concatenate([np.zeros((len(values), 1)), sums], axis=1)
    spoiled = np.concatenate([np.zeros((len(values), 1)), np.cumsum(~finite, axis=1)], axis=1)
    last = np.arange(1, len(steps) + 1)
    result = (sums[:, last] - sums[:, first]) / (weights[last] - weights[first])
    return np.where(spoiled[:, last] > spoiled[:, first], np.nan, result)


def summary(folder: Path) -> Table:
    """Losses at the marks, the share of learned updates, and what each method spent."""
    config, made, curves = read_run(folder)
    last = int(curves["step"].max())  # pyright: ignore[reportArgumentType]
    marks = [k for k in (100, 1_000, 10_000, 100_000, 1_000_000) if k < last] + [last]
    table = Table(title=config["title"] or config["name"])
    table.add_column("method")
    for k in marks:
        table.add_column(f"loss at {k:,}", justify="right")
    for name in ("learned", "seconds", "us a step", "gradients"):
        table.add_column(name, justify="right")
    losses = {k: _means(mark_loss(curves, k), "loss") for k in marks}
    final = curves.filter(pl.col("step") == pl.col("step").max().over("method"))
    spent = {name: _means(final, name) for name in COUNTERS}
    used = _means(curves.with_columns(used=_weighted("used_learned")), "used")
    for method in config["methods"]:
        seconds = made["seconds"][method]
        guarded = spent["gradients"][method] > last  # the others take one gradient a step
        table.add_row(
            method,
            *(f"{losses[k][method]:.4g}" for k in marks),
            f"{used[method]:.0%}" if guarded else "",
            f"{seconds:.1f}",
            f"{1e6 * seconds / last / config['seeds']:.0f}",
            f"{spent['gradients'][method]:,.0f}",
        )
    return table


def _weighted(column: str) -> pl.Expr:
    """The mean over all steps of a method and seed, whose bins differ in width."""
    width = pl.col("step") - pl.col("step").shift(1, fill_value=0).over("method", "seed")
    both = ("method", "seed")
    return (pl.col(column) * width).sum().over(both) / width.sum().over(both)


def _means(table: pl.DataFrame, column: str) -> dict[str, Any]:
    means = table.group_by("method").agg(pl.col(column).mean())
    return dict(zip(means["method"], means[column], strict=True))
