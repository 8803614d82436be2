"""What records hold of the paper's figures: losses at marks, on the seeds that methods share.

Loss(m, k) is the mean over seeds of method m's training loss, averaged over the steps in
[0.9 k, k]. Methods are compared on the seeds that all of them have at k.

Letters: m a method, k an optimizer step.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ..config import as_config
from ..curves import COUNTERS, divided, mark_loss, step_mean
from ..records import EVALUATIONS, Record, read_parquet
from .recipes import FIRST, PAPERS

MARKS = (30, *(a * 10**n for n in range(2, 7) for a in (1, 3)))
"""Steps at which losses are compared."""
FREE = ("title", "tested_on", "steps", "seeds", "seed", "methods", "vectorize", "nc", "adam_rate")
"""Settings in which a run may differ from its recipe and still be of its figure."""
FUNCTIONS = ("make_task", "make_methods")
"""Compared only by whether they are this package's: they may have been renamed since the run."""
COLUMNS = ("method", "seed", "step", "loss", "used_learned", *COUNTERS)


class NotRunError(Exception):
    """What a claim needs was not run, or not as far; says what."""


class Losses(NamedTuple):
    """Loss(m, k) of some methods at one mark, over the seeds that all of them have there."""

    seeds: int
    of: Mapping[str, float]
    """By method; infinite where it is not finite, so that it is worse than any other."""


@dataclass(frozen=True)
class Figure:
    """The curves of one figure, of all folders that have some.

    A method at another nc or rate of Adam than the recipe's is called so: "LGL2O (nc 100)", "Adam
    0.01". Of one method and seed it is the longest curve.
    """

    curves: pl.DataFrame
    """Columns ``COLUMNS``; seeds are counted from 0, not from the first of a run."""
    folders: Mapping[str, Path]
    """Where each method is."""
    nt: int = 10
    nc: int = 10

    @cached_property
    def lasts(self) -> dict[str, dict[int, int]]:
        """The last step of each method and seed."""
        ends = self.curves.group_by("method", "seed").agg(pl.col("step").max())
        lasts: dict[str, dict[int, int]] = {}
        for method, seed, step in ends.iter_rows():
            lasts.setdefault(method, {})[seed] = step
        return lasts

    def has(self, *methods: str) -> bool:
        """Whether all of them were run."""
        return {*methods} <= self.lasts.keys()

    def seeds(self, methods: Iterable[str], k: float) -> list[int]:
        """Those with which all of these methods reached step k."""
        reached = ({s for s, last in self.lasts.get(m, {}).items() if last >= k} for m in methods)
        return sorted(set.intersection(*reached))

    def last(self, *methods: str) -> int:
        """The last step that one seed reached with all of these methods, 0 if there is none."""
        ends = [self.lasts.get(m, {}) for m in methods]
        shared = set.intersection(*map(set, ends))
        return max((min(one[seed] for one in ends) for seed in shared), default=0)

    def losses(self, methods: Iterable[str], k: int, *, seeds_at: int = 0) -> Losses:
        """At step k, over the seeds that reached k and a later step; raises if none did."""
        methods = list(methods)
        seeds = self._reached(methods, max(k, seeds_at))
        means = _means(mark_loss(self._of(methods, seeds), k), "loss")
        if means.keys() != {*methods}:
            raise NotRunError(f"{' and '.join(methods)} have no loss at {k:,}")
        return Losses(len(seeds), means)

    def over_first(self, method: str, k: int) -> tuple[float, int]:
        """The loss at step k over that of step 1, of the seeds that reach k, and how many do."""
        first, last = self.losses([method], 1, seeds_at=k), self.losses([method], k)
        return divided(last.of[method], first.of[method]), last.seeds

    def rise(self, method: str, k: int) -> tuple[float, int]:
        """Loss(m, k) over its least at a mark up to k, of the seeds that reach k; how many do."""
        marks = (*(j for j in MARKS if j < k), k)
        losses = [self.losses([method], j, seeds_at=k) for j in marks]
        of = [one.of[method] for one in losses]
        return divided(of[-1], min(of)), losses[-1].seeds

    def share(self, method: str, first: float, last: float) -> tuple[float, int]:
        """Share of learned steps from the first to the last, and over how many seeds."""
        seeds = self._reached([method], last)
        table = step_mean(self._of([method], seeds), "used_learned", first=first, last=last)
        return _means(table, "used_learned")[method], len(seeds)

    def spent(self, method: str) -> dict[str, float]:
        """What was counted, a step."""
        row = self.curves.filter(pl.col("method") == method).sort("step").tail(1)
        return {name: row[name][0] / row["step"][0] for name in COUNTERS}

    def tested(self, method: str, first: int) -> tuple[int, float]:
        """The step at which it was first evaluated from a step on, and its mean test loss there."""
        file = self.folders.get(method, Path()) / EVALUATIONS
        table = read_parquet(file) if file.exists() else pl.DataFrame({"method": [], "step": []})
        table = table.filter(pl.col("method") == method, pl.col("step") >= first)
        if table.is_empty():
            raise NotRunError(f"{method} was not tested at {first:,} or later")
        at = table.filter(pl.col("step") == pl.col("step").min())
        return int(at["step"][0]), float(at["test_loss"].mean())  # pyright: ignore

    def _reached(self, methods: list[str], k: float) -> list[int]:
        """The seeds that reached k; raises if none did."""
        if missing := [m for m in methods if not self.has(m)]:
            raise NotRunError(f"no run has {', '.join(missing)}")
        if not (seeds := self.seeds(methods, k)):
            told = f"{methods[0]} was" if len(methods) == 1 else f"{', '.join(methods)} were"
            raise NotRunError(f"{told} not run to {int(k):,}")
        return seeds

    def _of(self, methods: Iterable[str], seeds: Iterable[int]) -> pl.DataFrame:
        return self.curves.filter(
            pl.col("method").is_in(list(methods)), pl.col("seed").is_in(list(seeds))
        )


def _means(table: pl.DataFrame, column: str) -> dict[str, float]:
    means = table.group_by("method").agg(pl.col(column).mean())
    return {m: value if math.isfinite(value) else math.inf for m, value in means.iter_rows()}


class Evidence(NamedTuple):
    """What the records of several folders hold."""

    figures: Mapping[str, Figure]
    """By the name of the recipe; figure 2's first steps are in ``fig02``, by data set."""
    meta: Mapping[str, Record]
    """Of meta-training, by the name of what was trained; of several the last given."""

    def figure(self, name: str) -> Figure:
        """One of them; raises if no run is of it."""
        if name not in self.figures:
            raise NotRunError(f"no run of {name}")
        return self.figures[name]

    def meta_training(self, name: str) -> pl.DataFrame:
        """Its curves; raises if there is no run of it."""
        if name not in self.meta:
            raise NotRunError(f"no meta-training of {name}")
        return self.meta[name].curves


def gather(records: Mapping[Path, Record]) -> Evidence:
    """What the records of these folders say; those of other experiments are passed over."""
    tables: dict[str, dict[Path, pl.DataFrame]] = {}
    meta = {record.config["name"]: record for record in records.values() if record.is_meta}
    for folder, record in records.items():
        if not record.is_meta and (figure := _figure(record.config)):
            tables.setdefault(figure, {})[folder] = _labelled(record)
    return Evidence({figure: _joined(figure, found) for figure, found in tables.items()}, meta)


def _figure(config: Mapping[str, Any]) -> str | None:
    """The figure that a run is of, if it has the settings of its recipe but for ``FREE``."""
    name = config["name"]
    if name == "fig02":  # put together from runs on several data sets
        return name
    if not name.startswith("fig") or name not in PAPERS or not has_settings(config):
        return None
    return name.partition("-")[0]


def has_settings(config: Mapping[str, Any]) -> bool:
    """Whether a run has the settings of the recipe that it is named after, but for ``FREE``."""
    expected = as_config(PAPERS[config["name"]]())
    found = expected | dict(config)
    for name in FUNCTIONS:
        found[name] = expected[name] if found[name].startswith("lossguard.") else found[name]
    return all(found[name] == expected[name] for name in expected if name not in FREE)


def _labelled(record: Record) -> pl.DataFrame:
    """The curves, with methods named as in ``Figure``."""
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
    return curves.select(COLUMNS).with_columns(
        pl.col("method").replace(labels), (pl.col("seed") + config["seed"]).cast(pl.Int64)
    )


def _joined(figure: str, tables: Mapping[Path, pl.DataFrame]) -> Figure:
    """Of each method and seed the longest curve; of several the last given."""
    longest, folders = {}, {}
    for folder, table in tables.items():
        for key, curve in table.group_by("method", "seed", maintain_order=True):
            if key not in longest or curve["step"].max() >= longest[key]["step"].max():
                longest[key], folders[str(key[0])] = curve, folder
    recipe = PAPERS.get(figure)
    settings = {} if recipe is None else {"nt": recipe().nt, "nc": recipe().nc}
    columns = [curve.cast(dict.fromkeys(COLUMNS[3:], pl.Float64)) for curve in longest.values()]
    return Figure(pl.concat(columns), folders, **settings)
