"""What a run leaves on disk: a folder that says what was run, on what, and what came of it.

    config.json          everything to run it again
    manifest.json        commit, versions, device, wall time
    curves.parquet       what happened, thinned to three significant digits of the step
    evaluations.parquet  loss and accuracy on both whole splits, at steps 50, 100, 200, ...

Nothing that looks whole is half written: each file is written beside its name and then renamed.
"""

import contextlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from .guards.protocol import Decision

CONFIG, MANIFEST, CURVES = "config.json", "manifest.json", "curves.parquet"
EVALUATIONS, VERDICTS = "evaluations.parquet", "verdicts.json"
PACKAGES = ("lossguard", "jax", "jaxlib", "optax", "equinox", "numpy", "polars")


def open_folder(folder: Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
    """Make the folder of a run and put its config there, or go on with the same run's.

    Raises:
        ValueError: if the folder holds another run, or this one and ``resume`` is false, or its
            config is damaged.
        OSError: if it can't be made.
    """
    path = folder / CONFIG
    if path.exists():
        if _read_json(path) != json.loads(json.dumps(config)):
            raise ValueError(
                f"folder must be empty or hold the same run, but {folder} holds another"
            )
        if not resume:
            raise ValueError(
                f"folder {folder} holds this run already: add --resume to go on with it"
            )
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be empty or hold the same run, but {folder} is a file")
    if folder.exists() and any(entry != _part(path) for entry in folder.iterdir()):
        raise ValueError(
            f"folder must be empty or hold the same run, but {folder} holds other files"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def manifest(**more: Any) -> dict[str, Any]:
    """Where and with what a run was made: time, command, commit, versions, device."""
    device = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["lossguard", *sys.argv[1:]],
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": device.device_kind
        if device.platform != "cpu"
        else f"cpu ({os.cpu_count()} cores)",
        "platform": platform.platform(),
        **more,
    }


def thin(decisions: Decision, start: np.ndarray, spent: pl.DataFrame | None = None) -> pl.DataFrame:
    """A chunk of decisions, summed over bins of three significant digits of the step.

    Args:
        decisions: with axes [seeds, cycles], as a rollout over several seeds returns them.
        start: [seeds], optimizer steps taken before the chunk.
        spent: the last chunk's totals, as :func:`totals` makes them.

    Returns:
        One row for each seed and bin: ``seed``, ``step`` (where the bin ends: every step up to
        1,000, then every tenth, and so on), ``last`` (the last step taken in it), ``count`` of
        steps, and sums over these. Bins that two chunks share are joined by :func:`join`.
    """
    d = jax.tree.map(np.asarray, decisions)
    seeds, cycles, nt = d.losses.shape
    within = np.arange(nt)
    taken = within < d.steps[..., None]
    first = start[:, None] + np.cumsum(d.steps, axis=1) - d.steps
    share = (within + 1) / np.maximum(d.steps, 1)[..., None]

    def each_step(per_cycle: np.ndarray) -> np.ndarray:
        return np.broadcast_to(per_cycle[..., None], d.losses.shape)[taken]

    def total_by_step(name: str) -> np.ndarray:
        per_cycle = getattr(d, name).astype(np.float64)
        before = np.zeros((seeds, 1)) if spent is None else spent[name].to_numpy()[:, None]
        until = before + np.cumsum(per_cycle, axis=1) - per_cycle
        return (until[..., None] + share * per_cycle[..., None])[taken]

    step = (first[..., None] + within + 1)[taken]
    width = 10 ** np.maximum(0, np.floor(np.log10(step)).astype(np.int64) - 2)
    sums = {
        "loss": d.losses[taken].astype(np.float64),
        "used_learned": d.used_learned[taken].astype(np.float64),
        "learned_loss": each_step(d.learned_loss).astype(np.float64),
        "fallback_loss": each_step(d.fallback_loss).astype(np.float64),
    }
    return (
        pl.DataFrame(
            {
                "seed": each_step(np.broadcast_to(np.arange(seeds)[:, None], (seeds, cycles))),
                "step": -(-step // width) * width,
                "last": step,
                **sums,
                **{name: total_by_step(name) for name in COUNTERS},
            }
        )
        .group_by("seed", "step", maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("count"),
            pl.col(list(sums)).sum(),
            pl.col("last", *COUNTERS).max(),
        )
    )


COUNTERS = ("gradients", "forwards", "learned_updates")


def totals(thinned: pl.DataFrame) -> pl.DataFrame:
    """What each seed has spent by the end of a thinned chunk."""
    return thinned.group_by("seed", maintain_order=True).agg(pl.col(list(COUNTERS)).max())


def join(chunks: list[pl.DataFrame], method: str) -> pl.DataFrame:
    """The curves of a method: the chunks' sums, joined and turned into means.

    Columns: ``method``, ``seed``, ``step`` (the last of a bin), ``loss`` (mean training loss over
    the bin's steps), ``used_learned`` (share of them), ``learned_loss`` and ``fallback_loss`` (mean
    check losses, NaN for guards without), ``gradients``, ``forwards``, ``learned_updates`` (spent
    until the step).
    """
    means = ["loss", "used_learned", "learned_loss", "fallback_loss"]
    return (
        pl.concat(chunks)
        .group_by("seed", "step", maintain_order=True)
        .agg(pl.col("count", *means).sum(), pl.col("last", *COUNTERS).max())
        .sort("seed", "step")
        .select(
            pl.lit(method).alias("method"),
            pl.col("seed").cast(pl.Int32),
            pl.col("last").alias("step"),
            (pl.col(means) / pl.col("count")).cast(pl.Float32),
            pl.col(list(COUNTERS)),
        )
    )


def mark_loss(curves: pl.DataFrame, k: int) -> pl.DataFrame:
    """Loss(m, k): the mean training loss over the steps in [0.9 k, k], by method and seed.

    Bins are taken whole. Columns ``method``, ``seed``, ``loss``.
    """
    return step_mean(curves, "loss", first=0.9 * k - 1e-9, last=k)


def step_mean(
    curves: pl.DataFrame, column: str, *, first: float = 0, last: float = math.inf
) -> pl.DataFrame:
    """The mean of a column over the steps from ``first`` to ``last``, by method and seed.

    Bins are weighted by the steps that they hold. Columns ``method``, ``seed``, and the one named.
    """
    both = ("method", "seed")
    width = pl.col("step") - pl.col("step").shift(1, fill_value=0).over(both)
    return (
        curves.with_columns(width=width)
        .filter(pl.col("step").is_between(first, last))
        .group_by(both, maintain_order=True)
        .agg((pl.col(column) * pl.col("width")).sum() / pl.col("width").sum())
    )


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], pl.DataFrame]:
    """Config, manifest and curves of a finished run.

    Raises:
        ValueError: if the folder holds no finished run, or a file of it is damaged.
    """
    for name in (CONFIG, MANIFEST, CURVES):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no finished run: {name} is missing")
    config, made = _read_json(folder / CONFIG), _read_json(folder / MANIFEST)
    return config, made, read_parquet(folder / CURVES)


def read_parquet(path: Path) -> pl.DataFrame:
    """A table from disk.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable Parquet file: {reason}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    _write(path, (json.dumps(content, indent=2) + "\n").encode())


def write_parquet(path: Path, table: pl.DataFrame) -> None:
    """A table, whole or not at all."""
    buffer = io.BytesIO()  # Polars reports a full disk as a damaged file
    table.write_parquet(buffer, compression="zstd", compression_level=9)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"can't write a record: {reason}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.part")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds {type(content).__name__}")
    return content


def _commit() -> str | None:
    """The commit that the package runs from, marked if the tree differs; None if unknown."""
    where = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
