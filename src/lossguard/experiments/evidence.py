"""What records hold of the paper's figures: losses at marks, on the seeds that methods share.

Loss(m, k) is the mean over seeds of method m's training loss, averaged over the steps in
[0.9 k, k]. Methods are compared on the seeds that all of them have at k.

Letters: m a method, k an optimizer step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ..config import as_config
from ..curves import COUNTERS, mark_loss, over_seeds, step_mean
from ..metatrain.recipes import RECIPES
from ..records import EVALUATIONS, Record, of_seeds, read_parquet
from .recipes import FIRST, PAPERS

MARKS = (30, *(a * 10**n for n in range(2, 7) for a in (1, 3)))
"""Steps at which losses are compared."""
DRAWS = 1_000
"""Of seeds, for an interval."""
FREE = ("title", "tested_on", "steps", "seeds", "seed", "methods", "vectorize", "nc", "adam_rate")
"""Settings in which a run may differ from its recipe and still be of its figure."""
SETTLED = ("dataset", "batch_size", "optimizees", "truncation", "shortest", "longest", "hidden")
"""Settings of a meta-training that claims are about."""
FUNCTIONS = ("make_task", "make_methods")
"""Compared only by whether they are this package's: they may have been renamed since the run."""


class NotRunError(Exception):
    """What a claim needs was not run, or not as far; says what."""


@dataclass(frozen=True)
class FigureCurves:
    """The curves of one figure, of all folders that have some.

    A method at another nc or rate of Adam than the recipe's is called so: "LGL2O (nc 100)", "Adam
    0.01". Of one method and seed it is the longest curve.
    """

    curves: dict[str, dict[int, pl.DataFrame]]
    """By method and seed; seeds are counted from 0, not from the first of a run."""
    folders: dict[str, Path]
    """Where each method is."""

    def run(self, methods: Sequence[str]) -> Sequence[str]:
        """Those of these methods that were run, the first one if none was."""
        return [m for m in methods if m in self.curves] or methods[:1]

    def lasts(self, method: str) -> dict[int, int]:
        """The last step of each seed of a method."""
        return {seed: curve["step"][-1] for seed, curve in self.curves.get(method, {}).items()}

    def seeds(self, methods: Sequence[str], k: float) -> list[int]:
        """Those with which all of these methods reached step k; raises if none did."""
        if missing := [m for m in methods if m not in self.curves]:
            raise NotRunError(f"no run has {', '.join(missing)}")
        reached = ({s for s, last in self.lasts(m).items() if last >= k} for m in methods)
        if not (seeds := sorted(set.intersection(*reached))):
            told = f"{methods[0]} was" if len(methods) == 1 else f"{', '.join(methods)} were"
            raise NotRunError(f"{told} not run to {int(k):,}")
        return seeds

    def last(self, *methods: str) -> int:
        """The last step that one seed reached with all of these methods, 0 if there is none."""
        ends = [self.lasts(m) for m in methods]
        shared = set.intersection(*map(set, ends))
        return max((min(one[seed] for one in ends) for seed in shared), default=0)

    def of_seeds(self, methods: Sequence[str], k: int, earlier: Sequence[int] = ()) -> pl.DataFrame:
        """Loss(m, k) of each seed with which all of these methods reached k.

        Columns ``step``, ``seed``, and one for each method; rows for each earlier step below k, of
        the same seeds, and the last for k.
        """
        seeds, tables = self.seeds(methods, k), []
        curves = self.of(methods, seeds)
        for j in (*(j for j in earlier if j < k), k):
            wide = mark_loss(curves, j).pivot("method", index="seed", values="loss")
            tables.append(wide.select(pl.lit(j).alias("step"), "seed", *methods))
        return pl.concat(tables)

    def share(self, method: str, first: float, last: float) -> tuple[float, int]:
        """Share of learned steps from the first to the last, and over how many seeds."""
        seeds = self.seeds([method], last)
        table = step_mean(self.of([method], seeds), "used_learned", first=first, last=last)
        return over_seeds(table, "used_learned")[method], len(seeds)

    def spent(self, method: str) -> tuple[float, float]:
        """Gradients and forward passes a step, of the longest curve."""
        curves = self.curves[method].values()
        last = max((curve[-1] for curve in curves), key=lambda row: row["step"][0])
        return tuple(last[name][0] / last["step"][0] for name in ("gradients", "forwards"))

    def tested(self, method: str, first: int) -> tuple[int, float]:
        """The first step from one on with a test loss of the most seeds, and the mean there."""
        file = self.folders.get(method, Path()) / EVALUATIONS
        table = read_parquet(file) if file.exists() else pl.DataFrame({"method": [], "step": []})
        table = table.filter(pl.col("method") == method, pl.col("step") >= first)
        if table.is_empty():
            raise NotRunError(f"{method} was not tested at {first:,} or later")
        means = table.group_by("step").agg(pl.col("test_loss").mean(), seeds=pl.len()).sort("step")
        at = means.filter(pl.col("seeds") == pl.col("seeds").max()).row(0, named=True)
        return at["step"], at["test_loss"]

    def of(self, methods: Sequence[str], seeds: Sequence[int]) -> pl.DataFrame:
        """The curves of these methods and seeds, one after another."""
        return pl.concat(self.curves[m][seed] for m in methods for seed in seeds)


def mean_losses(each: pl.DataFrame) -> pl.DataFrame:
    """Over the seeds, a row for each step of what ``FigureCurves.of_seeds`` gives.

    Infinite where a mean is not finite, so that it is worse than any other.
    """
    means = each.group_by("step", maintain_order=True).agg(pl.all().exclude("seed").mean())
    return means.select(_or_inf(pl.all().exclude("step")))


def interval(each: pl.DataFrame, expression: pl.Expr) -> tuple[float, float]:
    """The middle 95 % of what an expression makes of mean losses at the last step.

    Args:
        each: losses as ``FigureCurves.of_seeds`` gives them; ``DRAWS`` times as many seeds as there
            are is drawn from them, with replacement.
        expression: of columns of mean losses, a row for each step.
    """
    methods = each.columns[2:]
    losses = each.select(methods).to_numpy().reshape(-1, each["seed"].n_unique(), len(methods))
    count = losses.shape[1]
    drawn = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    means = losses[:, drawn].mean(axis=2).swapaxes(0, 1)  # [draws, steps, methods]
    table = pl.DataFrame(means.reshape(-1, len(methods)), methods).select(_or_inf(pl.all()))
    table = table.with_columns(draw=np.arange(DRAWS).repeat(len(losses)))
    found = table.group_by("draw").agg(value=expression.last())["value"]
    low, high = (found.quantile(part, "nearest") for part in (0.025, 0.975))
    return float(low), float(high)  # pyright: ignore[reportArgumentType]


def _or_inf(column: pl.Expr) -> pl.Expr:
    return pl.when(column.is_finite()).then(column).otherwise(math.inf)


class Evidence(NamedTuple):
    """What the records of several folders hold."""

    figures: Mapping[str, FigureCurves]
    """By the name of the recipe; figure 2's first steps are in ``fig02``, by data set."""
    meta: Mapping[str, Mapping[int, pl.DataFrame]]
    """Curves of meta-training, by the name of what was trained and its seed; of several the last
    given."""


def gather(records: Mapping[Path, Record]) -> Evidence:
    """What the records of these folders say; those of other experiments are passed over."""
    figures: dict[str, FigureCurves] = {}
    for folder, record in records.items():
        if not record.is_meta and (name := _figure(record.config)):
            figure = figures.setdefault(name, FigureCurves({}, {}))
            for (method, seed), curve in _labelled(record).group_by("method", "seed"):
                seeds, curve = figure.curves.setdefault(str(method), {}), curve.sort("step")
                if seed not in seeds or curve["step"][-1] >= seeds[seed]["step"][-1]:
                    seeds[int(seed)], figure.folders[str(method)] = curve, folder
    meta: dict[str, dict[int, pl.DataFrame]] = {}
    for config, _, curves in (record for record in records.values() if record.is_meta):
        if _is_of_recipe(config):
            first, seeds = config.get("seed", 0), meta.setdefault(config["name"], {})
            seeds |= {first + seed: own for seed, own in of_seeds(curves).items()}
    return Evidence(figures, meta)


def _is_of_recipe(config: Mapping[str, Any]) -> bool:
    """Whether a meta-training, where it tells its ``SETTLED``, has those of a recipe's."""
    for expected in (as_config(recipe()) for recipe in RECIPES.values()):
        if expected["name"] == config["name"]:
            known = [name for name in SETTLED if name in expected and name in config]
            return all(config[name] == expected[name] for name in known)
    return False


def _figure(config: Mapping[str, Any]) -> str | None:
    """The figure that a run is of, if it has the settings of its recipe but for ``FREE``."""
    name = config["name"]
    return figure_of(name) if name == "fig02" or (name in PAPERS and has_settings(config)) else None


def figure_of(name: str) -> str | None:
    """The figure of the paper that a run of this name is of, such as "fig02"."""
    together = name == "fig02"  # from runs on several data sets
    of_paper = together or (name in PAPERS and name.startswith("fig"))
    return name.partition("-")[0] if of_paper else None


def has_settings(config: Mapping[str, Any]) -> bool:
    """Whether a run has the settings of the recipe that it is named after, but for ``FREE``."""
    expected = as_config(PAPERS[config["name"]]())
    found = expected | dict(config)
    for name in FUNCTIONS:
        found[name] = expected[name] if found[name].startswith("lossguard.") else found[name]
    return all(found[name] == expected[name] for name in expected if name not in FREE)


def _labelled(record: Record) -> pl.DataFrame:
    """The curves, with methods named as in ``FigureCurves``."""
    config, _, curves = record
    name, labels = config["name"], {}
    if name in PAPERS:
        recipe = PAPERS[name]()
        if name.removeprefix("fig02-") in FIRST:
            labels = {"L2O": name.removeprefix("fig02-")}
        if (nc := config.get("nc", recipe.nc)) != recipe.nc:
            labels |= {m: f"{m} (nc {nc})" for m in config["methods"] if m.startswith("LGL2O")}
        if (rate := config.get("adam_rate", recipe.adam_rate)) != recipe.adam_rate:
            labels["Adam"] = f"Adam {rate:g}"
    return curves.select(
        pl.col("method").replace(labels),
        pl.col("seed").cast(pl.Int64) + config["seed"],
        "step",
        pl.col("loss", "used_learned", *COUNTERS).cast(pl.Float64),
    )
