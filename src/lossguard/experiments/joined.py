"""Several runs put together to one record: each of its methods is "a label: a method of a run"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..curves import COUNTERS, last_step
from ..records import (
    CONFIG,
    CURVES,
    EVALUATIONS,
    MANIFEST,
    checksums_in,
    read_parquet,
    read_run,
    write_json,
    write_parquet,
)

FIRST = 50
"""Up to this step every step is kept."""
ENDS = (1, 1.5, 2, 2.7, 3, 4, 5, 6, 7, 8, 9)
"""Times a power of ten: where bins end after that, as [0.9 k, k] does for k = 1 and 3."""
SCHEMA: Mapping[Any, Any] = {
    "seed": pl.Int64,
    "step": pl.Int64,
    **dict.fromkeys(("loss", "used_learned"), pl.Float32),
    **dict.fromkeys(COUNTERS, pl.Float64),
}
"""Of joined curves: records of different times differ in theirs."""
OF_A_RUN = ("time", "command", "commit", "device", "versions", "python", "platform")


@dataclass(frozen=True)
class Part:
    """Methods of one run."""

    label: str
    """Of the setting in which it was made."""
    folder: Path
    methods: Mapping[str, str]
    """Their names in the run, and here."""
    most: int
    """The step up to which they are taken."""


def join(parts: Sequence[Part], folder: Path, *, name: str, title: str) -> Path:
    """Put runs together in a folder that is empty or absent.

    Curves are means over bins, without check losses; evaluations are those at the end.

    Raises:
        ValueError: if a run isn't finished or lacks a method, or two parts have one in common.
    """
    curves, evaluations, runs = [], [], []
    seconds: dict[str, float] = {}
    for part in parts:
        config, made, table = read_run(part.folder)
        if missing := [one for one in part.methods if one not in config["methods"]]:
            raise ValueError(f"methods of {part.folder} must have {', '.join(missing)}")
        names = {old: f"{part.label}: {new}" for old, new in part.methods.items()}
        if twice := [one for one in names.values() if one in seconds]:
            raise ValueError(f"parts must have different methods, but two have {', '.join(twice)}")
        seconds |= {new: made["seconds"][old] for old, new in names.items()}
        evaluated = read_parquet(part.folder / EVALUATIONS)
        own = [_renamed(one, names, part.most) for one in (table, evaluated)]
        curves.append(_binned(own[0]))
        at_end = pl.col("step") == pl.col("step").max().over("method", "seed")
        evaluations.append(own[1].filter(at_end))
        runs += _runs(made, curves[-1], names)
    table = pl.concat(curves)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"name": name, "title": title, "methods": [*seconds], "seed": 0}
    config |= {"seeds": table["seed"].n_unique(), "steps": last_step(table)}
    write_json(folder / CONFIG, config)
    write_parquet(folder / CURVES, table)
    write_parquet(folder / EVALUATIONS, pl.concat(evaluations, how="diagonal_relaxed"))
    made = {"data": "", "seconds": seconds, "runs": runs, "sha256": checksums_in(folder)}
    write_json(folder / MANIFEST, made)
    return folder


def of(table: pl.DataFrame, label: str, methods: Mapping[str, str]) -> pl.DataFrame:
    """The curves of some methods of one part, by other names."""
    return _renamed(table, {f"{label}: {old}": new for old, new in methods.items()})


def _renamed(table: pl.DataFrame, names: Mapping[str, str], most: float = np.inf) -> pl.DataFrame:
    chosen = pl.col("method").is_in(list(names)) & (pl.col("step") <= most)
    return table.filter(chosen).with_columns(pl.col("method").replace(names))


def _binned(curves: pl.DataFrame) -> pl.DataFrame:
    """Means over bins that end at ``ENDS``, each weighted by its steps."""
    powers = 10 ** np.arange(1, 8)
    ends = np.union1d(np.arange(1, FIRST + 1), np.outer(powers, ENDS).ravel()).astype(np.int64)
    both = ("method", "seed")
    width = pl.col("step") - pl.col("step").shift(1, fill_value=0).over(both)
    until = ends[np.searchsorted(ends, curves["step"].to_numpy())]
    means = ("loss", "used_learned")
    return (
        curves.with_columns(width=width, end=pl.Series(until))
        .group_by(*both, "end", maintain_order=True)
        .agg(
            pl.col("step").max(),
            *((pl.col(one) * pl.col("width")).sum() / pl.col("width").sum() for one in means),
            pl.col(list(COUNTERS)).max(),
        )
        .drop("end")
        .cast(SCHEMA)
    )


def _runs(
    made: Mapping[str, Any], curves: pl.DataFrame, names: Mapping[str, str]
) -> list[dict[str, Any]]:
    """What made these curves: the run, or the runs that it was itself put together from."""
    ends = curves.group_by("method", "seed", maintain_order=True).agg(pl.col("step").max())
    told: dict[tuple[str, int], list[tuple[str, int]]] = {}
    sources = {}
    for method, seed, step in ends.iter_rows():
        old = next(one for one, new in names.items() if new == method)
        source = next(
            one
            for one in made.get("runs", [made])
            if old in one.get("methods", [old]) and seed in one.get("seeds", [seed])
        )
        key = (str(source["command"]) + source["time"], step)
        sources[key] = source
        told.setdefault(key, []).append((method, seed))
    return [
        {
            "methods": [*dict.fromkeys(method for method, _ in pairs)],
            "seeds": [*dict.fromkeys(seed for _, seed in pairs)],
            "steps": key[1],
            **{field: sources[key][field] for field in OF_A_RUN if field in sources[key]},
        }
        for key, pairs in told.items()
    ]
