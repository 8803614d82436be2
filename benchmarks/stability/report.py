"""Tables and the figure, made from records alone.

Letters: G gradients a run may evaluate. A loss is held-out; one above that before training, or that
isn't finite, counts as that before training. Ratios are to the oracle: AdamW on clean data at the
good rate, with the same seed.
"""

import gzip
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy import stats

from .faults import CLEAN, FAULTS
from .methods import METHODS, OURS

LAST = 0.1
"""The part of G over which the final loss is a mean; and at the start, what isn't the way."""


class Key(NamedTuple):
    """What a record is of; ``fault`` is also "tune" with a rate, or "cost"."""

    task: str
    method: str
    fault: str
    seed: int


Records = dict[Key, dict[str, Any]]


class Row(NamedTuple):
    """A method, over all tasks and seeds.

    Attributes:
        cells: final loss, ratio, by the fault's name: geometric means.
        faults, low, high: their geometric mean over the faults, with the 95 % interval of Student's
            t over pairs of task and seed; NaN of a single pair.
        rates, others: as ``faults``, of those that are a rate all along, and of the others.
        tasks: ``faults`` of each task by itself.
        seconds: as ``faults``, after as many seconds as AdamW takes for G gradients.
        worst: as ``faults``, of the highest loss after a tenth of the run.
        gradients: a minibatch, on clean data.
        time: a minibatch, on clean data, in units of AdamW's.
        copies: held between steps, the model included, in copies of the parameters.
        acted: interventions in 1,000 minibatches of clean data; None where they aren't counted.
        front: whether no row with less ``time`` has lower ``faults``.
    """

    method: str
    cells: Mapping[str, float]
    faults: float
    low: float
    high: float
    rates: float
    others: float
    tasks: Mapping[str, float]
    seconds: float
    worst: float
    gradients: float
    time: float
    copies: float
    acted: float | None
    front: bool = False


def losses(record: Mapping[str, Any], begin: float, end: float) -> list[float]:
    """At the marks after ``begin`` gradients and up to ``end``."""
    start = record["start"]
    seen = [min(loss, start) for spent, loss in record["curve"] if begin < spent <= end]
    return [start if math.isnan(loss) else loss for loss in seen]


def final(record: Mapping[str, Any], spent: float = math.inf) -> float:
    """The mean over the last tenth of G before a number of gradients."""
    if record["error"] or not record["curve"]:
        return record["start"]
    end = min(spent, record["curve"][-1][0])
    return statistics.fmean(losses(record, end - LAST * record["curve"][-1][0], end))


def worst(record: Mapping[str, Any]) -> float:
    """The highest loss after the first tenth."""
    if record["error"] or not record["curve"]:
        return record["start"]
    return max(losses(record, LAST * record["curve"][-1][0], math.inf))


def rows(records: Records) -> list[Row]:
    """Of all methods whose records are complete, in the order of ``METHODS``."""
    pairs = _pairs(records)
    names = [fault.name for fault in (CLEAN, *FAULTS)]
    found = [
        _row(records, method, pairs, names)
        for method in METHODS
        if pairs
        and all(Key(task, method, name, seed) in records for task, seed in pairs for name in names)
    ]
    return [
        row._replace(front=not any(o.time < row.time and o.faults < row.faults for o in found))
        for row in found
    ]


def _pairs(records: Records) -> list[tuple[str, int]]:
    """Tasks and seeds of which as much is recorded as of any."""
    faults = {fault.name for fault in (CLEAN, *FAULTS)}
    counts = Counter((key.task, key.seed) for key in records if key.fault in faults)
    return sorted(pair for pair, count in counts.items() if count == max(counts.values()))


def _row(
    records: Records, method: str, pairs: Sequence[tuple[str, int]], names: Sequence[str]
) -> Row:
    costs = {key.task: records[key] for key in records if key[1:3] == (method, "cost")}
    ratios: dict[str, dict[str, list[float]]] = {"final": {}, "seconds": {}, "worst": {}}
    for name in names:
        for task, seed in pairs:
            oracle = final(records[Key(task, "AdamW", CLEAN.name, seed)])
            record = records[Key(task, method, name, seed)]
            budget = record["curve"][-1][0] / costs[task]["time"] if record["curve"] else 0
            told = {"final": final(record), "seconds": final(record, budget)}
            for what, loss in (told | {"worst": worst(record)}).items():
                ratios[what].setdefault(name, []).append(loss / oracle)

    def over_faults(what: str) -> list[float]:
        """For each pair."""
        return [_mean(row) for row in zip(*(ratios[what][name] for name in names[1:]), strict=True)]

    clean = [records[Key(task, method, CLEAN.name, seed)] for task, seed in pairs]
    spent = [record["curve"][-1][0] / record["minibatches"] for record in clean]
    times = [costs[task]["time"] * each for (task, _), each in zip(pairs, spent, strict=True)]
    finals = over_faults("final")
    of_tasks = {
        task: [f for f, (t, _) in zip(finals, pairs, strict=True) if t == task] for task in costs
    }
    cells = {name: _mean(ratios["final"][name]) for name in names}
    return Row(
        method,
        cells,
        *_interval(finals),
        _mean(cells[fault.name] for fault in FAULTS if not fault.bad),
        _mean(cells[fault.name] for fault in FAULTS if fault.bad),
        {task: _mean(own) for task, own in of_tasks.items() if own},
        _mean(over_faults("seconds")),
        _mean(over_faults("worst")),
        statistics.fmean(spent),
        _mean(times),
        statistics.fmean(cost["copies"] for cost in costs.values()),
        _in_a_thousand(clean),
    )


def _in_a_thousand(clean: Sequence[Mapping[str, Any]]) -> float | None:
    if any(record["acted"] is None for record in clean):
        return None
    taken = sum(record["minibatches"] for record in clean)
    return 1000 * sum(record["acted"] for record in clean) / taken


def _mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95 % interval."""
    center, n = _mean(values), len(values)
    if n == 1:
        return center, math.nan, math.nan
    error = statistics.stdev(map(math.log, values)) / math.sqrt(n)
    factor = math.exp(float(stats.t.ppf(0.975, n - 1)) * error)
    return center, center / factor, center * factor


def write(records: Records, folder: Path) -> None:
    """``table.csv`` of methods, ``runs.jsonl.gz`` of all that was run, and ``figure.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    table = rows(records)
    lines = [json.dumps({**key._asdict(), **record}) for key, record in sorted(records.items())]
    runs = "".join(f"{line}\n" for line in lines).encode()
    (folder / "runs.jsonl.gz").write_bytes(gzip.compress(runs, mtime=0))
    told = [{"method": row.method, **row.cells, **row.tasks, **row._asdict()} for row in table]
    pl.DataFrame(told).drop("cells", "tasks").write_csv(folder / "table.csv", float_precision=5)
    draw(table).savefig(folder / "figure.png", dpi=110)


def draw(table: Sequence[Row]) -> Figure:
    """Left: final losses by fault. Right: their mean over the faults, against time."""
    figure = Figure(figsize=(13, 0.34 * len(table) + 1.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _cells(left, table)
    for number, row in enumerate(table, 1):
        color = "tab:red" if row.method in OURS else "tab:gray"
        errors = None if math.isnan(row.low) else [[row.faults - row.low], [row.high - row.faults]]
        right.errorbar(
            row.time, row.faults, errors, marker="o", color=color, elinewidth=0.8, markersize=11,
            markeredgecolor="black" if row.front else "white",
        )  # fmt: skip
        right.text(
            row.time, row.faults, str(number), ha="center", va="center_baseline", fontsize=7,
            color="white", zorder=3,
        )  # fmt: skip
    right.margins(0.12)
    right.set(xscale="log", yscale="log", xlabel="time of a minibatch / AdamW's, clean data")
    right.set(xticks=[1, 1.2, 1.5, 2], yticks=[1, 1.2, 1.5, 2, 3])
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    right.set_title("mean over the faults (red: ours; black edge: on the front)", fontsize=10)
    return figure


def _cells(axes: Axes, table: Sequence[Row]) -> None:
    values = [[*row.cells.values(), row.faults] for row in table]
    highest = max(2.0, *(max(row) for row in values))
    axes.imshow(values, cmap="YlOrRd", norm=LogNorm(1, highest), aspect="auto")
    axes.set_xticks(range(len(values[0])), [*table[0].cells, "faults"], rotation=30, ha="left")
    axes.set_yticks(range(len(table)), [f"{row.method}  {k}" for k, row in enumerate(table, 1)])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for label, row in zip(axes.get_yticklabels(), table, strict=True):
        label.set_color("tab:red" if row.method in OURS else "black")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            dark = math.log(max(value, 1)) > 0.6 * math.log(highest)
            axes.text(
                x, y, f"{value:.2f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
    axes.set_title("final held-out loss / AdamW's at the good rate without faults", fontsize=10)
