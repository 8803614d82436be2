"""What records hold of the paper's figures, and what formulas over their losses find in them.

Loss(m, k) is the mean over seeds of method m's training loss, averaged over the steps in
[0.9 k, k]. Methods are compared on the seeds that all of them have at k.

Letters: m a method, k an optimizer step.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ..config import as_config
from ..curves import COUNTERS, divided, mark_loss, step_mean
from ..records import EVALUATIONS, Record, read_parquet
from .recipes import FIRST, PAPERS

FREE = ("title", "tested_on", "steps", "seeds", "seed", "methods", "vectorize", "nc", "adam_rate")
"""Settings in which a run may differ from its recipe and still be of its figure."""
FUNCTIONS = ("make_task", "make_methods")
"""Compared only by whether they are this package's: they may have been renamed since the run."""
COLUMNS = ("method", "seed", "step", "loss", "used_learned", *COUNTERS)


class Losses(NamedTuple):
    """Loss(m, k) of some methods at one mark, over the seeds that all of them have there."""

    k: int
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

    def seeds(self, methods: Iterable[str], k: int) -> list[int]:
        """Those with which all of these methods reached step k."""
        reached = ({s for s, last in self.lasts.get(m, {}).items() if last >= k} for m in methods)
        return sorted(set.intersection(*reached))

    def last(self, *methods: str) -> int:
        """The last step that one seed reached with all of these methods, 0 if there is none."""
        ends = [self.lasts.get(m, {}) for m in methods]
        shared = set.intersection(*map(set, ends))
        return max((min(one[seed] for one in ends) for seed in shared), default=0)

    def losses(self, methods: Iterable[str], k: int, *, seeds_at: int = 0) -> Losses | None:
        """At step k, over the seeds that reached k and a later step; None if none did."""
        methods = list(methods)
        seeds = self.seeds(methods, max(k, seeds_at))
        if not seeds:
            return None
        means = _means(mark_loss(self._of(methods, seeds), k), "loss")
        return Losses(k, len(seeds), means) if means.keys() == {*methods} else None

    def over_first(self, method: str, k: int) -> Losses | None:
        """The loss at step k over that of step 1, of the seeds that reach k."""
        first, last = self.losses([method], 1, seeds_at=k), self.losses([method], k)
        if not (first and last):
            return None
        return last._replace(of={method: divided(last.of[method], first.of[method])})

    def share(self, method: str, first: float, last: float) -> tuple[float, int] | None:
        """Share of learned steps from the first to the last, and over how many seeds."""
        seeds = self.seeds([method], int(last))
        if not seeds:
            return None
        table = step_mean(self._of([method], seeds), "used_learned", first=first, last=last)
        return _means(table, "used_learned")[method], len(seeds)

    def spent(self, method: str) -> dict[str, float]:
        """What was counted, a step."""
        row = self.curves.filter(pl.col("method") == method).sort("step").tail(1)
        return {name: row[name][0] / row["step"][0] for name in COUNTERS}

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
    if name not in PAPERS or not has_settings(config):
        return None
    return name.partition("-")[0] if name.startswith("fig") else None


def has_settings(config: Mapping[str, Any]) -> bool:
    """Whether a run has the settings of the recipe that it is named after, but for ``FREE``."""

    def plain(name: str, value: Any) -> Any:
        ours = name in FUNCTIONS and str(value).startswith("lossguard.")
        return "lossguard" if ours else value

    return all(
        plain(name, config.get(name, value)) == plain(name, value)
        for name, value in as_config(PAPERS[config["name"]]()).items()
        if name not in FREE
    )


def _labelled(record: Record) -> pl.DataFrame:
    """The curves, with methods named as in ``Figure``."""
    config, _, curves = record
    name = config["name"]
    labels = {method: method for method in config["methods"]}
    if name in PAPERS:
        recipe = PAPERS[name]()
        if name.removeprefix("fig02-") in FIRST:
            labels = {"L2O": name.removeprefix("fig02-")}
        if config.get("nc", recipe.nc) != recipe.nc:
            labels |= {m: f"{m} (nc {config['nc']})" for m in labels if m.startswith("LGL2O")}
        if "Adam" in labels and config.get("adam_rate", recipe.adam_rate) != recipe.adam_rate:
            labels["Adam"] = f"Adam {config['adam_rate']:g}"
    return curves.select(COLUMNS).with_columns(
        pl.col("method").replace(labels), (pl.col("seed") + config["seed"]).cast(pl.Int64)
    )


def _joined(figure: str, tables: Mapping[Path, pl.DataFrame]) -> Figure:
    """Of each method and seed the longest curve; of several the last given."""
    both, longest, folders = ("method", "seed"), {}, {}
    for folder, table in tables.items():
        for key, curve in table.group_by(both, maintain_order=True):
            if key not in longest or curve["step"].max() >= longest[key]["step"].max():
                longest[key] = curve
                folders[str(key[0])] = folder
    recipe = PAPERS.get(figure)
    settings = {} if recipe is None else {"nt": recipe().nt, "nc": recipe().nc}
    columns = [curve.cast(dict.fromkeys(COLUMNS[3:], pl.Float64)) for curve in longest.values()]
    return Figure(pl.concat(columns), folders, **settings)


def tested(figure: Figure, method: str, first: int) -> tuple[int, float] | None:
    """A method's mean loss on the whole test set, where it was first evaluated from a step on."""
    file = figure.folders.get(method, Path()) / EVALUATIONS
    if not file.exists():
        return None
    table = read_parquet(file).filter(pl.col("method") == method, pl.col("step") >= first)
    if table.is_empty():
        return None
    at = table.filter(pl.col("step") == pl.col("step").min())
    return int(at["step"][0]), float(at["test_loss"].mean())  # pyright: ignore


MARKS = (30, *(a * 10**n for n in range(2, 7) for a in (1, 3)))
"""Steps at which losses are compared."""


class Finding(NamedTuple):
    """Whether a formula holds, and the numbers that say so."""

    holds: bool | None
    """None if it was not run."""
    numbers: str
    seeds: Mapping[int, int] = {}
    """How many at each mark."""


Of = Mapping[str, float]
"""Loss(m, k) by method."""
Formula = Callable[[Figure], Finding]


def at_marks(
    marks: Sequence[int],
    what: str,
    methods: Sequence[str],
    value: Callable[[Of], float],
    holds: Callable[[float], bool],
    *,
    beyond: bool = False,
) -> Formula:
    """Whether a value of the losses passes at every mark: one that fails decides."""

    def formula(figure: Figure) -> Finding:
        if missing := [m for m in methods if not figure.has(m)]:
            return Finding(None, f"no run has {', '.join(missing)}")
        found = {k: losses for k in marks if (losses := figure.losses(methods, k))}
        values = {k: value(losses.of) for k, losses in found.items()}
        failed = [k for k, one in values.items() if not holds(one)]
        later = [k for k in MARKS if beyond and k > marks[-1]]
        more = {k: value(one.of) for k in later if (one := figure.losses(methods, k))}
        told = _told(values, failed) + (f"; beyond: {_told(more, [])}" if more else "")
        reached = len(found) == len(marks)
        seeds = {k: losses.seeds for k, losses in found.items()}
        return Finding(False if failed else True if reached else None, f"{what}: {told}", seeds)

    return formula


def _told(values: Mapping[int, float], failed: Sequence[int]) -> str:
    """Three values one by one; of more the highest, the last, and where they fail first."""
    if len(values) <= 3:
        return ", ".join(f"{short(one)} at {k:,}" for k, one in values.items()) or "no mark"
    last, highest = max(values), max(values, key=lambda k: values[k])
    told = f"at most {short(values[highest])}, at {highest:,}"
    told += f"; {short(values[last])} at {last:,}" if last != highest else ""
    return told + (f"; fails at {failed[0]:,} first" if failed else "")


def ratio_of(
    method: str,
    others: Sequence[str],
    marks: Sequence[int],
    holds: Callable[[float], bool],
    *,
    beyond: bool = False,
    what: str = "",
) -> Formula:
    """Loss(method, k) over the least of the others', tested at these marks."""
    best = others[0] if len(others) == 1 else f"the best of {', '.join(others)}"
    what = what or f"{method} over {best}"
    methods = [method, *others]
    return at_marks(marks, what, methods, over(method, *others), holds, beyond=beyond)


def below(bound: float) -> Callable[[float], bool]:
    return lambda ratio: ratio < bound


def up_to(bound: float) -> Callable[[float], bool]:
    return lambda ratio: ratio <= bound


def above(bound: float) -> Callable[[float], bool]:
    return lambda ratio: ratio > bound


def short(value: float) -> str:
    """Two significant digits."""
    if not math.isfinite(value):
        return "inf"
    rounded = float(f"{value:.1e}")
    if rounded == 0 or 1e-3 <= rounded < 1e4:
        return f"{rounded:g}"
    digits, _, power = f"{rounded:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def over(a: str, *b: str) -> Callable[[Of], float]:
    """Loss(a) over the least of the others."""
    return lambda of: divided(of[a], min(of[m] for m in b))


def each(*formulas: Formula) -> Formula:
    """All of them."""
    return lambda figure: all_of(formula(figure) for formula in formulas)


def all_of(findings: Iterable[Finding]) -> Finding:
    """All hold: one that fails decides, then one that was not run."""
    found = list(findings)
    outcomes = {one.holds for one in found}
    holds = False if False in outcomes else None if None in outcomes else True
    return together(holds, found)


def either(names: Sequence[str], formula: Callable[[str], Formula]) -> Formula:
    """By one of these methods at least, of those that were run."""

    def judge(figure: Figure) -> Finding:
        found = [formula(name)(figure) for name in names if figure.has(name)]
        outcomes = {one.holds for one in found}
        holds = True if True in outcomes else False if False in outcomes else None
        return together(holds, found or [Finding(None, f"no run has {names[0]}")])

    return judge


def together(holds: bool | None, found: Sequence[Finding]) -> Finding:
    """Several as one, which holds or not; at a mark the fewest seeds count."""
    seeds: dict[int, int] = {}
    for one in found:
        for k, count in one.seeds.items():
            seeds[k] = min(count, seeds.get(k, count))
    return Finding(holds, "; ".join(one.numbers for one in found), seeds)


def rise(figure: Figure, method: str, k: int) -> tuple[float, int] | None:
    """Loss(m, k) over its least at a mark up to k, and over how many seeds: those that reach k."""
    found = [figure.losses([method], j, seeds_at=k) for j in (*(j for j in MARKS if j < k), k)]
    losses = [one.of[method] for one in found if one]
    return (divided(losses[-1], min(losses)), found[-1].seeds) if found[-1] else None


def rises(method: str, k: int, expected: bool) -> Formula:
    """Whether a method is above twice its least loss at step k; what lies beyond is told."""

    def formula(figure: Figure) -> Finding:
        found = {j: one for j in (k, *MARKS) if j >= k and (one := rise(figure, method, j))}
        if k not in found:
            return Finding(None, f"{method} was not run to {k:,}")
        told = [f"{short(ratio)} at {j:,}" for j, (ratio, _) in found.items()]
        numbers = f"{method} over its least so far: {told[0]}"
        numbers += f"; beyond: {', '.join(told[1:])}" if told[1:] else ""
        return Finding((found[k][0] > 2) == expected, numbers, {k: found[k][1]})

    return formula


def from_first(
    method: str, k: int, holds: Callable[[float], bool], *, or_rises: bool = False
) -> Formula:
    """Whether Loss(method, k) over its first loss passes, or it rises by k."""

    def formula(figure: Figure) -> Finding:
        found = figure.over_first(method, k)
        if not found:
            return Finding(None, f"{method} was not run to {k:,}")
        ratio, risen = found.of[method], rise(figure, method, k)
        passes = holds(ratio) or (or_rises and risen is not None and risen[0] > 2)
        numbers = f"{method} at {k:,} over its first loss: {short(ratio)}"
        return Finding(passes, numbers, {k: found.seeds})

    return formula
