"""A table and a figure of methods that were run on the same minibatches, for the examples."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure

from lossguard.runs.drawing import save

Row = dict[str, Any]


def marks(calls: int) -> list[int]:
    """An eighth of all minibatches, a quarter, half, and all."""
    return [calls // part for part in (8, 4, 2, 1)]


def follow(
    step: Callable[[Any], float], batches: Iterable[Any], evaluate: Callable[[], float], calls: int
) -> list[Row]:
    """What came of a training, minibatch by minibatch.

    Args:
        step: takes a minibatch to train on, and gives its loss.
        batches: the minibatches.
        evaluate: the loss of the model as it is, asked for at the marks.
        calls: how many minibatches there are.
    """
    seconds, rows = 0.0, []
    for call, batch in enumerate(batches, 1):
        began = time.process_time()
        loss = step(batch)
        seconds += time.process_time() - began
        with torch.no_grad():
            unseen = evaluate() if call in marks(calls) else None
        rows.append({"minibatches": call, "loss": loss, "unseen": unseen, "seconds": seconds})
    return rows


def compare(
    methods: Sequence[str],
    train: Callable[[str, int], list[Row]],
    calls: int,
    seeds: int,
    title: str,
    out: Path | None,
) -> pl.DataFrame:
    """Run each method with each seed, and print the means as they come.

    Args:
        methods: what to run.
        train: what came of a method, with a seed, minibatch by minibatch.
        calls: minibatches that each of them trains on.
        seeds: how many.
        title: what is compared.
        out: a folder for all rows and their figure.

    Returns:
        All rows, with their method and seed.
    """
    print(f"{title}; mean loss on minibatches that none of them uses, after")
    print(" " * 20 + "".join(f"{mark:8,}" for mark in marks(calls)) + "   highest   seconds")
    tables = []
    for method in methods:
        runs = [
            {"method": method, "seed": seed} | row
            for seed in range(seeds)
            for row in train(method, seed)
        ]
        table = pl.DataFrame(runs, infer_schema_length=None)
        at_marks = table.group_by("minibatches").agg(pl.col("unseen").mean()).drop_nulls()
        means = "".join(f"{loss:8.3f}" for loss in at_marks.sort("minibatches")["unseen"])
        seconds = table["seconds"].filter(table["minibatches"] == calls).mean()
        print(f"{method:20}{means}{table['loss'].max():10.2f}{seconds:10.1f}", flush=True)
        tables.append(table)
    rows = pl.concat(tables)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        rows.cast({pl.Float64: pl.Float32}).write_parquet(out / "losses.parquet")
        save(draw(rows, title), out)
    return rows


def draw(rows: pl.DataFrame, title: str, window: int = 20) -> Figure:
    """Training losses: means over ``window`` minibatches, bands from the lowest to the highest.

    Lines are each thinner than the one before, which it may lie on.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lately = pl.col("loss").rolling_mean(window, min_samples=1).over("method", "seed")
    methods = rows["method"].unique(maintain_order=True)
    for method, width in zip(methods, np.linspace(4, 1, len(methods)), strict=True):
        of_method = rows.with_columns(lately).filter(method=method).group_by("minibatches")
        loss = pl.col("loss")
        line = of_method.agg(mean=loss.mean(), low=loss.min(), high=loss.max()).sort("minibatches")
        (drawn,) = axes.plot(line["minibatches"], line["mean"], label=method, linewidth=width)
        band = line["low"], line["high"]
        axes.fill_between(line["minibatches"], *band, color=drawn.get_color(), alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="Minibatches", ylabel="Training loss", title=title)
    axes.grid(which="major", alpha=0.3)
    axes.legend(frameon=False)
    return figure
