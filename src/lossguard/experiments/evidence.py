"""What records hold of the paper's figures: losses at marks, on the seeds that methods share.

Loss(m, k) is the mean over seeds of method m's training loss, averaged over the steps in
[0.9 k, k]. Methods are compared on the seeds that all of them have at k.

Letters: m a method, k an optimizer step, or a meta-step.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from ..cli.terminal import tell
from ..runs.curves import mark_loss, with_bins
from ..runs.records import EVALUATIONS, Record, of_seeds, read_parquet
from .recipes import PAPERS

MARKS = (30, *(a * 10**n for n in range(2, 7) for a in (1, 3)))
"""Steps at which losses are compared."""
ALSO = (*range(1, 11), 20, 40, 50, 600, 700, 800, 900, 50_000, 120_000)
"""Further ones, for single claims."""
MEANS = ("loss", "used_learned", "gradients", "forwards")
"""What is known of a method at a mark, over the same steps; the last two are those of a step."""
PREFIX = f"^({'|'.join((*MEANS, 'test_loss'))})_"
DRAWS = 1_000
"""Of seeds, for an interval."""


class NotRunError(Exception):
    """What a claim needs was not run, or not as far; says what."""


class Measured(NamedTuple):
    """A value at step k."""

    value: float
    seeds: int
    """Of how many it is."""
    low: float
    """With ``high``, the middle 95 % of it where as many seeds are drawn with replacement."""
    high: float


class Evidence(NamedTuple):
    """What is known of a figure, or of a meta-training, of all folders that have some."""

    marks: pl.DataFrame
    """A row for each mark and seed: ``step``, ``seed``, and of each method ``MEANS`` and
    ``test_loss``, as in "loss_L2O"; null where the seed doesn't get there. Seeds are counted from
    0, not from the first of a run. A method at another nc or rate of Adam than the recipe's is
    called so: "LGL2O (nc 100)", "Adam 0.01"."""

    def run(self, methods: Sequence[str]) -> Sequence[str]:
        """Those of these methods that were run, the first one if none was."""
        return [m for m in methods if f"loss_{m}" in self.marks.columns] or methods[:1]

    def measure(self, value: pl.Expr, k: int) -> Measured:
        """What an expression is for step k, on the seeds that get there.

        Args:
            value: of means over seeds, a row for each mark up to k, and of ``step``. One that is
                not finite is infinite, so that it is worse than any other.
            k: a mark.

        Raises:
            NotRunError: if no seed gets to k with all that the expression names.
        """
        names = [name for name in dict.fromkeys(value.meta.root_names()) if name != "step"]
        told = ", ".join(dict.fromkeys(re.sub(PREFIX, "", name) for name in names))
        if not {*names} <= {*self.marks.columns}:
            raise NotRunError(f"no run has {told}")
        wide = self.marks.select("step", "seed", *names).filter(pl.col("step") <= k)
        reached = wide.filter(step=k).drop_nulls()["seed"]
        if reached.is_empty():
            raise NotRunError(f"not run to {k:,}: {told}")
        wide = wide.filter(pl.col("seed").is_in(reached.implode()))
        wide = wide.filter(pl.len().over("step") == len(reached))
        steps = wide["step"].unique(maintain_order=True)
        losses = wide.select(names).to_numpy().reshape(len(steps), len(reached), len(names))
        drawn = np.random.default_rng(0).integers(len(reached), size=(DRAWS, len(reached)))
        drawn = np.concatenate([[np.arange(len(reached))], drawn])  # first the seeds themselves
        means = losses[:, drawn].mean(axis=2).swapaxes(0, 1)  # [draws, steps, names]
        means = np.where(np.isfinite(means), means, np.inf).reshape(-1, len(names))
        draws = np.arange(len(drawn)).repeat(len(steps))
        table = pl.DataFrame(means, names).with_columns(
            draw=draws, step=np.tile(steps.to_numpy(), len(drawn))
        )
        of_each = table.group_by("draw", maintain_order=True).agg(value=value.last())
        found, *others = of_each["value"].cast(pl.Float64).to_list()
        low, high = np.quantile(others, (0.025, 0.975), method="nearest")
        return Measured(found, len(reached), float(low), float(high))


def gather(records: Mapping[Path, Record]) -> dict[str, Evidence]:
    """What records of a figure say, by the figure, or by the name of the meta-training.

    Figure 2's first steps are in ``fig02``, by data set.
    """
    runs: dict[str, list[pl.DataFrame]] = {}
    meta: dict[str, dict[int, pl.DataFrame]] = {}
    for folder, record in records.items():
        try:
            figure = record.config.get("figure")
            if figure and record.is_meta:
                of_seed = _losses(record)
                meta.setdefault(record.config["name"], {}).update(of_seed)
            elif figure:
                tested = folder / EVALUATIONS
                evaluations = read_parquet(tested) if tested.exists() else None
                own = labelled(record, _labels(record), evaluations)
                runs.setdefault(figure, []).append(own)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever a strange record makes fail
            tell(f"{folder} can't be judged: {type(error).__name__}: {error}")
    trained = {name: pl.concat(own.values()).sort("step", "seed") for name, own in meta.items()}
    evidence = {name: of_curves(tables) for name, tables in runs.items()}
    return evidence | {name: Evidence(table) for name, table in trained.items()}


def of_curves(tables: Sequence[pl.DataFrame]) -> Evidence:
    """Curves of a figure, ``labelled``: of a method and seed the longest, of several the last."""
    both = ("method", "seed")
    curves = pl.concat(table.with_columns(run=number) for number, table in enumerate(tables))
    ends = curves.group_by(*both, "run").agg(end=pl.col("step").max()).sort("end", "run")
    curves = curves.join(ends.group_by(both).last(), on=(*both, "run")).sort(*both, "step")
    curves = with_bins(curves)
    rows = [
        mark_loss(curves.filter(pl.col("end") >= k), k, MEANS)
        .join(curves.filter(step=k).select(*both, "test_loss"), on=both, how="left")
        .with_columns(step=pl.lit(k, pl.Int64))
        for k in sorted({*MARKS, *ALSO})
    ]
    values = (*MEANS, "test_loss")
    wide = pl.concat(rows).pivot("method", index=("step", "seed"), values=values)
    return Evidence(wide.sort("step", "seed"))


def labelled(
    record: Record, labels: Mapping[str, str], evaluations: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Its curves, and losses on the test set, with other names for methods."""
    spent, place = pl.col("gradients", "forwards") / pl.col("step"), ("method", "seed", "step")
    counts = pl.col("seed", "step").cast(pl.Int64)
    curves = record.curves.with_columns(spent, counts, test_loss=None)
    if evaluations is not None and "test_loss" in evaluations.columns:
        tested = evaluations.with_columns(counts).select(*place, "test_loss")
        curves = curves.drop("test_loss").join(tested, on=place, how="left")
    if curves.select(place).is_duplicated().any():
        raise ValueError("a step of a seed is there twice")
    return curves.select(
        pl.col("method").cast(pl.String).replace(labels),
        (pl.col("seed") + record.config["seed"]).cast(pl.Int64),
        "step",
        pl.col(*MEANS, "test_loss").cast(pl.Float64),
    )


def _labels(record: Record) -> dict[str, str]:
    """Methods of a figure's own run that are called otherwise in ``Evidence``."""
    config, labels = record.config, {}
    if (name := config["name"]) in PAPERS:
        recipe = PAPERS[name]()
        if config["figure"] == "fig02":
            labels = {"L2O": config["dataset"]}
        if (nc := config.get("nc", recipe.nc)) != recipe.nc:
            methods = record.curves["method"].unique()
            labels |= {m: f"{m} (nc {nc})" for m in methods if m.startswith("LGL2O")}
        if (rate := config.get("adam_rate", recipe.adam_rate)) != recipe.adam_rate:
            labels["Adam"] = f"Adam {rate:g}"
    return labels


def _losses(record: Record) -> dict[int, pl.DataFrame]:
    """A meta-training's rows of ``Evidence``, by seed; each check is a mark.

    ``loss_validation`` and ``loss_meta``, and ``loss_first``, of an optimizee's first step.
    """
    tables = {}
    for seed, own in of_seeds(record.curves).items():
        losses, seed = own["validation"].to_numpy(), record.config.get("seed", 0) + seed
        columns = {"validation": losses.mean(axis=1), "meta": own["meta_loss"]}
        columns |= {"first": losses[0, 0]}
        tables[seed] = pl.DataFrame({f"loss_{name}": of for name, of in columns.items()}).select(
            own["meta_step"].cast(pl.Int64).alias("step"),
            pl.lit(seed, pl.Int64).alias("seed"),
            pl.all().cast(pl.Float64),
        )
    return tables
