"""What guards cost, and what they are worth at that price: from records of evaluations.

Price is counted in gradients: gradient evaluations + forward passes / 3 (``Decision.price``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax
import polars as pl
from rich.table import Table

from ..curves import PRICE, divided
from ..guards.best_of import best_of
from ..guards.hedged import hedged
from ..guards.loss_guard import loss_guard
from ..guards.recommended import recommended
from ..guards.unguarded import unguarded
from ..learned.pretrained import pretrained
from ..records import EVALUATIONS, read_parquet
from .experiment import Experiment, Methods, sgd_fallback, with_methods
from .recipes import fig03, fig04, fig05, fig06

MARKS = (100, 200, 300, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 20_000)
"""Prices at which the fallback alone is compared with the others."""
GRID = 1.02
"""Prices are looked at in steps of this factor."""
SMOOTHED = 0.1
"""Losses are means over this last part of the price."""

FALLBACK, LEARNED = "Fallback", "Learned"


def price_methods(experiment: Experiment) -> Methods:
    """Every guard, and its parts alone, over SGDnm or, in recipes named so, over Adam."""
    e = experiment
    over_adam = e.name.endswith("adam")
    fallback = optax.adam(e.adam_rate) if over_adam else sgd_fallback(e)

    def parts() -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        return pretrained(e.learned), fallback

    return {
        FALLBACK: lambda: unguarded(fallback, nt=e.nt, trusted=True),
        LEARNED: lambda: unguarded(pretrained(e.learned), nt=e.nt),
        "Recommended": lambda: recommended(*parts(), nt=e.nt),
        "Hedged": lambda: hedged(*parts(), nt=e.nt),
        "LGL2O": lambda: loss_guard(*parts(), nt=e.nt, nc=e.nc, loser=e.loser),
        "Best of both": lambda: best_of(
            [
                unguarded(fallback, nt=e.nt, trusted=True),
                unguarded(pretrained(e.learned), nt=e.nt),
            ],
            share=0.05,
        ),
    }


def price_recipe(task: str, over: str, learned: str) -> Experiment:
    """A task of ``TASKS``, a fallback, a learned optimizer; on seeds that nothing was chosen with.

    20 seeds on points, five on images.
    """
    e, points = TASKS[task](), task in ("spirals", "circles")
    return with_methods(
        price_methods,
        replace(e, name=f"price-{task}-{learned.split('-')[1]}-{over}"),
        title=f"{learned} over {over} on {task}, at equal price",
        learned=learned,
        seed=5_000,
        seeds=20 if points else 5,
        steps=STEPS[task],
        vectorize=False,
    )


def fashion() -> Experiment:
    """Fashion-MNIST + MLP, as figure 3."""
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
    """Loss on the whole training set against price, the mean of the seeds."""

    price: np.ndarray
    """Increasing, in gradients."""
    loss: np.ndarray
    """The mean loss over the last tenth of the price."""


def curve(evaluations: pl.DataFrame, method: str, seeds: Sequence[int] | None = None) -> Curve:
    """A method's curve, or that of some of its seeds, on a grid of prices that all of them reach.

    Between two evaluations losses are interpolated linearly in the logarithm of the price.
    """
    rows = evaluations.filter(pl.col("method") == method).with_columns(price=PRICE)
    runs = [
        (run["price"].to_numpy(), run["train_loss"].to_numpy())
        for (seed,), run in rows.sort("step").group_by("seed", maintain_order=True)
        if seeds is None or seed in seeds
    ]
    first, last = max(price[0] for price, _ in runs), min(price[-1] for price, _ in runs)
    grid = np.geomspace(first, last, max(2, int(np.log(last / first) / np.log(GRID))))
    losses = np.mean([np.interp(np.log(grid), np.log(p), loss) for p, loss in runs], axis=0)
    begin = np.searchsorted(grid, (1 - SMOOTHED) * grid)
    means = [losses[a : b + 1].mean() for b, a in enumerate(begin)]
    return Curve(grid, np.array(means))


def at(one: Curve, price: float) -> float:
    """Loss at a price; NaN beyond the end."""
    inside = one.price[0] * (1 - 1e-9) <= price <= one.price[-1] * (1 + 1e-9)
    return float(np.interp(np.log(price), np.log(one.price), one.loss)) if inside else np.nan


def slowdown(one: Curve, reference: Curve, price: float) -> float:
    """S: the price at which a curve first reaches the loss of the reference at a price, over that.

    Both as running minima. Below 1: faster than the reference. Infinite where it isn't reached.

    >>> reference = Curve(np.array([10.0, 100.0, 1000.0]), np.array([1.0, 0.5, 0.1]))
    >>> round(slowdown(reference._replace(price=2 * reference.price), reference, 100.0), 3)
    2.0
    """
    target = at(reference._replace(loss=np.minimum.accumulate(reference.loss)), price)
    loss = np.minimum.accumulate(one.loss)
    reached = np.flatnonzero(loss <= target * (1 + 1e-12))
    if np.isnan(target) or not reached.size:
        return np.nan if np.isnan(target) else np.inf
    j = int(reached[0])
    if j == 0:
        return float(one.price[0] / price)
    between = (loss[j - 1] - target) / (loss[j - 1] - loss[j])
    a, b = np.log(one.price[j - 1 : j + 1])
    return float(np.exp(a + between * (b - a)) / price)


def interval(
    evaluations: pl.DataFrame, method: str, price: float, *, draws: int = 200
) -> tuple[float, float]:
    """The middle 90 % of S when seeds are drawn again with replacement, of both methods alike."""
    seeds = evaluations["seed"].unique().sort().to_list()
    rng = np.random.default_rng(0)
    by_seed = {
        name: {seed: curve(evaluations, name, [seed]) for seed in seeds}
        for name in (method, FALLBACK)
    }

    def mean(name: str, drawn: Sequence[int]) -> Curve:
        curves = [by_seed[name][seed] for seed in drawn]
        first, last = max(c.price[0] for c in curves), min(c.price[-1] for c in curves)
        grid = curves[0].price[(curves[0].price >= first) & (curves[0].price <= last)]
        losses = [np.interp(np.log(grid), np.log(c.price), c.loss) for c in curves]
        return Curve(grid, np.mean(losses, axis=0))

    drawn = (rng.choice(seeds, len(seeds)).tolist() for _ in range(draws))
    values = [slowdown(mean(method, d), mean(FALLBACK, d), price) for d in drawn]
    low, high = np.quantile(values, (0.05, 0.95), method="nearest")
    return float(low), float(high)


class Row(NamedTuple):
    """A method of an experiment at a price of the fallback alone."""

    experiment: str
    method: str
    price: int
    slowdown: float
    low: float
    """The interval of the slowdown."""
    high: float
    ratio: float
    """Loss at equal price over the fallback's."""
    price_of_step: float
    """Mean price of a step from step 1,000 on, the dearest seed."""


def rows(folder: Path) -> Iterator[Row]:
    """All comparisons of a finished run with its fallback."""
    evaluations = read_parquet(folder / EVALUATIONS)
    reference = curve(evaluations, FALLBACK)
    for method in evaluations["method"].unique(maintain_order=True).to_list():
        own = curve(evaluations, method)
        for price in MARKS:
            if np.isnan(at(reference, price)) or price * 1.1 > own.price[-1]:
                continue
            low, high = interval(evaluations, method, price)
            yield Row(
                folder.name,
                method,
                price,
                slowdown(own, reference, price),
                low,
                high,
                at(own, price) / at(reference, price),
                price_of_step(evaluations, method),
            )


def price_of_step(evaluations: pl.DataFrame, method: str) -> float:
    """Mean price of a step from the first evaluation at 1,000 steps or more on: dearest seed."""
    late = evaluations.filter(pl.col("method") == method, pl.col("step") >= 1_000)
    spent = late.with_columns(price=PRICE)
    spans = spent.group_by("seed").agg(
        (pl.col("price").max() - pl.col("price").min())
        / (pl.col("step").max() - pl.col("step").min())
    )
    return float(spans["price"].max() or np.nan)  # pyright: ignore[reportArgumentType]


def table(found: Mapping[str, Path]) -> tuple[Table, pl.DataFrame]:
    """The whole table: a line for each experiment and method; and its rows as numbers."""
    every = pl.DataFrame([row for folder in found.values() for row in rows(folder)], Row._fields)
    shown = Table("experiment", "method", "a step", *(f"S({mark:,})" for mark in MARKS))
    for (experiment, method), one in every.group_by("experiment", "method", maintain_order=True):
        cells = {
            row["price"]: f"{row['slowdown']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
            for row in one.to_dicts()
        }
        cost = f"{one['price_of_step'][0]:.2f}"
        shown.add_row(str(experiment), str(method), cost, *(cells.get(mark, "") for mark in MARKS))
    return shown, every


def at_equal_price(reference: str, folder: Path) -> str:
    """What each method of a run is worth beside the first, when both have spent the same."""
    evaluations = read_parquet(folder / EVALUATIONS)
    methods = evaluations["method"].unique(maintain_order=True).to_list()
    curves = {method: curve(evaluations, method) for method in methods}
    base = curves[reference]
    end = float(min(one.price[-1] for one in curves.values()))
    half = end / 2
    others = [method for method in methods if method != reference]
    losses = (f"{m} {divided(at(curves[m], end), at(base, end)):.2g}" for m in others)
    times = (f"{m} {slowdown(curves[m], base, half):.2g}" for m in others)
    return (
        f"After a price of {end:,.0f} gradients, loss over that of {reference}: "
        f"{', '.join(losses)}\n"
        f"Price at which the loss of {reference} after {half:,.0f} is reached, over that price: "
        f"{', '.join(times)}\n"
        "Next: put a guard into a loop of your own (README.md), or see it all: "
        f"lossguard report {folder}"
    )
