"""What guards cost, and what they are worth at that price: from records of evaluations.

Price is counted in gradients: gradient evaluations + forward passes / 3 (``Decision.price``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
import polars as pl
from rich.box import SIMPLE
from rich.console import Group

from ..cli import terminal
from ..guards.hedged import hedged
from ..learned.pretrained import pretrained
from ..runs.curves import PRICE, divided
from ..runs.records import EVALUATIONS, read_parquet, read_run
from .experiment import (
    Experiment,
    Methods,
    alone,
    best_of_both,
    guarded,
    learned_alone,
    ours,
    sgd_fallback,
)
from .recipes import fig03, fig04, fig05, fig06

MARKS = (100, 200, 300, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 20_000)
"""Prices at which the fallback alone is compared with the others."""
GRID = 1.02
"""Prices are looked at in steps of this factor."""
SMOOTHED = 0.1
"""Losses are means over this last part of the price."""
LATE, BOUND = 1_000, 1.15
"""From this price on a guard is to be at most so many times slower than its fallback."""
DRAWS = 200
"""Of seeds, for an interval."""
COLUMNS = (
    "experiment", "method", "price", "slowdown", "low", "high", "ratio", "price_of_step",
    "highest", "reached", "times_seconds",
)  # fmt: skip
"""Of ``rows``, and of the CSV file."""
TITLE = "slowdown S over the fallback (intervals are in the CSV file)"
FALLBACK, LEARNED = "Fallback", "Learned"


def price_methods(over: str, e: Experiment) -> Methods:
    """Every guard, and its parts alone, over "sgdnm" or "adam"."""
    fallback = {"sgdnm": sgd_fallback(e), "adam": optax.adam(e.adam_rate)}[over]
    parts = {FALLBACK: alone(e, fallback), LEARNED: learned_alone(e)}
    return parts | {
        "Recommended": ours(e, fallback),
        "Hedged": lambda: hedged(pretrained(e.learned), fallback, nt=e.nt),
        "LGL2O": guarded(e, fallback),
        "Best of both": best_of_both(*parts.values()),
    }


def price_recipe(task: str, over: str, learned: str) -> Experiment:
    """A task of ``TASKS``, a fallback, a learned optimizer; on seeds that nothing was chosen with.

    20 seeds, five with the ConvNet. Images with the MLP have others: on these seeds of the other
    tasks a rule of the guards was found to be wrong.
    """
    e, points = TASKS[task](), task in ("spirals", "circles")
    return replace(
        e,
        name=f"price-{task}-{learned.split('-')[1]}-{over}",
        methods=(),
        make_methods=partial(price_methods, over),
        title=f"{learned} over {over} on {task}, at equal price",
        figure="",
        learned=learned,
        scaling="none" if points else "unit",
        loser="keep",
        seed=6_000 if task in ("mnist", "fashion") else 8_000,
        seeds=5 if task == "convnet" else 20,
        steps=STEPS[task],
    )


def fashion() -> Experiment:
    """Fashion-MNIST + MLP."""
    return replace(fig03(), name="fashion", dataset="fashion_mnist")


TASKS = {"mnist": fig03, "fashion": fashion, "spirals": fig05, "circles": fig04, "convnet": fig06}
STEPS = {"mnist": 5_000, "fashion": 5_000, "spirals": 20_000, "circles": 10_000, "convnet": 1_500}
RECIPES = {
    recipe().name: recipe
    for recipe in (
        partial(price_recipe, task, over, learned)
        for task in TASKS
        for over in ("sgdnm", "adam")
        for learned in ("lstm-mnist-mlp", "lstm-cifar10-conv")
    )
}
"""What ``lossguard benchmark price`` runs."""


class Curve(NamedTuple):
    """Loss on the whole training set against price."""

    price: np.ndarray
    """[points], increasing, in gradients: all seeds reach them."""
    loss: np.ndarray
    """[points], of one curve, or [seeds, points]: the mean over the last tenth of the price."""

    def mean(self, seeds: Any = slice(None)) -> "Curve":
        """The mean of all seeds, or of some of them, each as often as it is named."""
        return Curve(self.price, self.loss[seeds].mean(axis=0))


def curves(evaluations: pl.DataFrame, method: str) -> Curve:
    """Those of its seeds.

    Between two evaluations losses are interpolated linearly in the logarithm of the price.
    """
    rows = evaluations.filter(method=method).with_columns(price=PRICE).sort("seed", "step")
    runs = [
        (run["price"].to_numpy(), run["train_loss"].to_numpy())
        for _, run in rows.group_by("seed", maintain_order=True)
    ]
    first = max(price[0] for price, _ in runs)
    last = max(first, min(price[-1] for price, _ in runs))
    grid = np.geomspace(first, last, max(2, int(np.log(last / first) / np.log(GRID))))
    losses = np.array([np.interp(np.log(grid), np.log(price), loss) for price, loss in runs])
    begin = np.searchsorted(grid, (1 - SMOOTHED) * grid)
    means = [losses[:, a : b + 1].mean(axis=1) for b, a in enumerate(begin)]
    return Curve(grid, np.stack(means, axis=1))


def at(one: Curve, price: float) -> float:
    """Loss at a price; NaN beyond the end."""
    inside = one.price[0] * (1 - 1e-9) <= price <= one.price[-1] * (1 + 1e-9)
    return float(np.interp(np.log(price), np.log(one.price), one.loss)) if inside else np.nan


def slowdown(one: Curve, reference: Curve, price: float) -> float:
    """S: the price at which a curve first reaches the loss of the reference at a price, over that.

    Both as running minima. Below 1: faster than the reference. Infinite where it isn't reached, NaN
    beyond the end, and where the reference has no loss that is finite.
    """
    lowest, own = (
        np.minimum.accumulate(np.where(np.isnan(of.loss), np.inf, of.loss))
        for of in (reference, one)
    )
    target = at(reference._replace(loss=lowest), price)
    if not np.isfinite(target):
        return np.nan
    reached = np.interp(
        target + 1e-12 * abs(target), own[::-1], np.log(one.price)[::-1], left=np.inf
    )
    return float(np.exp(reached) / price)


def interval(each: Curve, reference: Curve, price: float) -> tuple[float, float]:
    """The middle 90 % of S when seeds are drawn again with replacement, of both methods alike."""
    seeds = len(each.loss)
    drawn = np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds))
    values = [slowdown(each.mean(own), reference.mean(own), price) for own in drawn]
    low, high = np.quantile(values, (0.05, 0.95), method="nearest")
    return float(low), float(high)


def highest(one: Curve, reference: Curve, end: float) -> tuple[float, bool]:
    """The highest S of all prices from ``LATE`` on, and whether that loss was reached.

    To the price at which a run that ends at ``end`` could still show that S is above the ``BOUND``.
    If it was not reached, S is at least that: the end of the curve over the price.
    """
    prices = np.geomspace(LATE, end / BOUND, 1 + int(np.log(end / BOUND / LATE) / np.log(GRID)))
    times = [(slowdown(one, reference, price), one.price[-1] / price) for price in prices]
    return max((min(s, least), s < np.inf) for s, least in times)


def rows(folder: Path) -> Iterator[tuple[Any, ...]]:
    """The ``COLUMNS`` of a finished run: its methods at prices of the fallback alone.

    ``low`` to ``high`` is the slowdown's interval, ``ratio`` the loss at equal price over the
    fallback's. ``highest`` is of all prices from ``LATE`` on that all methods get to, not of the
    ``MARKS`` alone; where it was not ``reached`` it is at least that. None in shorter runs.
    ``times_seconds`` are the seconds of the whole run, without compiling and evaluating, over the
    fallback's.
    """
    seconds = read_run(folder).manifest["seconds"]
    evaluations = read_parquet(folder / EVALUATIONS)
    methods = evaluations["method"].unique(maintain_order=True).to_list()
    found = {method: curves(evaluations, method) for method in methods}
    fallback = found[FALLBACK]
    reference, end = fallback.mean(), float(min(each.price[-1] for each in found.values()))
    for method, each in found.items():
        own, cost = each.mean(), price_of_step(evaluations, method)
        most = highest(own, reference, end) if end > BOUND * LATE else (None, None)
        longer = divided(seconds[method], seconds[FALLBACK])
        for price in MARKS:
            slower = slowdown(own, reference, price)
            if not np.isnan(slower) and price * 1.1 <= own.price[-1]:
                ends = interval(each, fallback, price)
                ratio = divided(at(own, price), at(reference, price))
                yield folder.name, method, price, slower, *ends, ratio, cost, *most, longer


def price_of_step(evaluations: pl.DataFrame, method: str) -> float:
    """Mean price of a step from the first evaluation at 1,000 steps or more on: dearest seed."""
    late = evaluations.filter(pl.col("method") == method, pl.col("step") >= 1_000)
    spent = late.with_columns(price=PRICE)
    spans = spent.group_by("seed").agg(
        (pl.col("price").max() - pl.col("price").min())
        / (pl.col("step").max() - pl.col("step").min())
    )
    return float(spans["price"].max() or np.nan)  # pyright: ignore[reportArgumentType]


def table(found: Mapping[str, Path]) -> tuple[Group, pl.DataFrame]:
    """A line for each experiment and method, and one for each method; and its rows as numbers."""
    made = [row for folder in found.values() for row in rows(folder)]
    every = pl.DataFrame(made, COLUMNS, orient="row", infer_schema_length=None)
    if every.is_empty():
        return Group(f"Too short: there are numbers from a price of {MARKS[0]:,.0f} on."), every
    told = every.select(
        "experiment",
        "method",
        pl.col("price_of_step").fill_nan(None).alias("a step"),
        pl.format("S({})", "price").alias("mark"),
        "slowdown",
    ).with_columns(pl.col("a step", "slowdown").map_elements("{:.2f}".format, pl.String))
    parts = {
        f"{experiment}: {TITLE}": own.pivot("mark", index=("method", "a step"), values="slowdown")
        for (experiment,), own in told.partition_by("experiment", as_dict=True).items()
    }
    late = [summed_up(row) for row in summary(every).rows(named=True)]
    heads = "experiments", f"within {BOUND}", f"median S({LATE:,})", "highest S", "a step, up to"
    title = f"All of them, at every price from {LATE:,} on"
    if late:
        parts[title] = pl.DataFrame(late, ("method", *heads, "times the seconds"), orient="row")
    narrow = {"box": SIMPLE, "padding": 0, "collapse_padding": True}
    shown = (terminal.table(of.columns, of.rows(), title=t, **narrow) for t, of in parts.items())
    return Group(*shown), every


def summary(every: pl.DataFrame) -> pl.DataFrame:
    """By method, of the rows of many experiments.

    Columns: ``method``; ``experiments``; those ``within`` the ``BOUND`` at all prices from ``LATE``
    on; the ``median`` slowdown at ``LATE``; the ``highest`` from there on, and whether it was
    ``reached``; the ``price_of_step``, the highest too; the ``least`` and the ``most`` of
    ``times_seconds``.
    """
    late = every.filter(pl.col("highest").is_not_null(), price=LATE)
    most = pl.col("highest").arg_max()
    return late.group_by("method", maintain_order=True).agg(
        experiments=pl.len(),
        within=(pl.col("reached") & (pl.col("highest") <= BOUND)).sum(),
        median=pl.col("slowdown").median(),
        highest=pl.col("highest").get(most),
        reached=pl.col("reached").get(most),
        price_of_step=pl.col("price_of_step").nan_max(),
        least=pl.col("times_seconds").min(),
        most=pl.col("times_seconds").max(),
    )


def summed_up(row: Mapping[str, Any]) -> list[str]:
    """The cells of a row of ``summary``; "> 2.00" where that loss was not reached."""
    highest = f"{'' if row['reached'] else '> '}{row['highest']:.2f}"
    told = f"{row['median']:.2f}".replace("inf", "never"), highest, f"{row['price_of_step']:.2f}"
    seconds = f"{row['least']:.1f} to {row['most']:.1f}"
    return [row["method"], str(row["experiments"]), str(row["within"]), *told, seconds]


def at_equal_price(reference: str, folder: Path) -> str:
    """What each method of a run is worth beside the first, when both have spent the same."""
    evaluations = read_parquet(folder / EVALUATIONS)
    methods = evaluations["method"].unique(maintain_order=True).to_list()
    if (evaluations.select(price=PRICE)["price"] <= 0).any():
        return "A method that costs nothing can't be compared at equal price."
    found = {method: curves(evaluations, method).mean() for method in methods}
    base = found.pop(reference)
    short = [method for method, one in found.items() if one.price[-1] < base.price[-1] / 2]
    found = {method: one for method, one in found.items() if method not in short}
    if not found:
        more = " that goes on as far" if short else ""
        return f"There is no other method{more} to compare with {reference}."
    every = base, *found.values()
    end = float(min(one.price[-1] for one in every))
    if end / 2 < max(one.price[0] for one in every):
        return "The run is too short to compare its methods at equal price."
    if not np.isfinite(slowdown(base, base, end / 2)):
        return f"{reference} diverges at once: there is nothing to compare with."
    if any(at(one, end) < 0 for one in every):
        return "Losses below 0 have no ratios: there is nothing to compare."
    losses = (f"{m} {divided(at(one, end), at(base, end)):.2g}" for m, one in found.items())
    slower = ((m, slowdown(one, base, end / 2)) for m, one in found.items())
    times = (f"{m} {'never' if np.isinf(s) else format(s, '.2g')}" for m, s in slower)
    left_out = f"\nNot compared, as they end earlier: {'; '.join(short)}" if short else ""
    return (
        f"After a price of {end:,.0f} gradients, loss over that of {reference}: "
        f"{'; '.join(losses)}\n"
        f"Part of {end / 2:,.0f} gradients that it takes to reach the lowest loss that "
        f"{reference} has by then: {'; '.join(times)}{left_out}"
    )
