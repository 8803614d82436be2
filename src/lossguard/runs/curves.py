"""Curves: what guards decided, thinned to what figures, tables and claims need."""

import math
from collections.abc import Sequence

import jax
import numpy as np
import polars as pl

from ..guards.protocol import Decision

COUNTERS = ("gradients", "forwards", "learned_updates")
"""What is counted from the start of a run."""
PRICE = pl.col("gradients") + pl.col("forwards") / 3
"""What was spent by then, in gradients (``Decision.price``)."""


def last_step(curves: pl.DataFrame) -> int:
    """The last optimizer step of curves as ``join`` makes them."""
    return int(curves["step"].max())  # pyright: ignore[reportArgumentType]


def thin(decisions: Decision, start: np.ndarray, spent: pl.DataFrame | None = None) -> pl.DataFrame:
    """A chunk of decisions, summed over bins of three significant digits of the step.

    Args:
        decisions: with axes [seeds, cycles], as a rollout over several seeds returns them.
        start: [seeds], optimizer steps taken before the chunk.
        spent: the last chunk's totals, as ``totals`` makes them.

    Returns:
        One row for each seed and bin: ``seed``, ``step`` (where the bin ends: every step up to
        1,000, then every tenth, and so on), ``last`` (the last step taken in it), ``count`` of
        steps, and sums over these. Bins that two chunks share are joined by ``join``.
    """
    d = jax.tree.map(np.asarray, decisions)
    seeds, cycles, nt = d.losses.shape
    share = (np.arange(nt) + 1) / nt

    def each_step(per_cycle: np.ndarray) -> np.ndarray:
        return np.repeat(per_cycle, nt, axis=-1).ravel()

    def total_by_step(name: str) -> np.ndarray:
        per_cycle = getattr(d, name).astype(np.float64)
        before = np.zeros((seeds, 1)) if spent is None else spent[name].to_numpy()[:, None]
        until = before + np.cumsum(per_cycle, axis=1) - per_cycle
        return (until[..., None] + share * per_cycle[..., None]).ravel()

    step = (start[:, None] + np.arange(cycles * nt) + 1).ravel()
    width = 10 ** np.maximum(0, np.floor(np.log10(step)).astype(np.int64) - 2)
    sums = {
        "loss": d.losses.ravel().astype(np.float64),
        "used_learned": d.used_learned.ravel().astype(np.float64),
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


def mark_loss(curves: pl.DataFrame, k: int, columns: str | Sequence[str] = "loss") -> pl.DataFrame:
    """Loss(m, k): the mean training loss over the steps in [0.9 k, k], by method and seed.

    Columns ``method``, ``seed``, ``loss``, or others in its place, of which it is the mean too.
    """
    return step_mean(curves, columns, first=0.9 * k - 1e-9, last=k)


def over_seeds(table: pl.DataFrame, column: str) -> dict[str, float]:
    """The mean of a column over the seeds, by method, in the order of the table."""
    means = table.group_by("method", maintain_order=True).agg(pl.col(column).mean())
    return dict(means.iter_rows())


def step_mean(
    curves: pl.DataFrame, column: str | Sequence[str], *, first: float = 0, last: float = math.inf
) -> pl.DataFrame:
    """The mean of columns over the steps from ``first`` to ``last``, by method and seed.

    Bins are weighted by those of their steps that are inside. Columns ``method``, ``seed``, and
    those named.
    """
    if "before" not in curves.columns:
        curves = with_bins(curves)
    begin = pl.max_horizontal("before", pl.lit(math.ceil(first) - 1))
    width = pl.min_horizontal("step", pl.lit(last)) - begin
    return (
        curves.filter(width > 0)
        .with_columns(width=width)
        .group_by("method", "seed", maintain_order=True)
        .agg((pl.col(column) * pl.col("width")).sum() / pl.col("width").sum())
    )


def with_bins(curves: pl.DataFrame) -> pl.DataFrame:
    """With ``before``, the step at which the last bin ended: for many a ``step_mean``."""
    return curves.with_columns(before=pl.col("step").shift(1, fill_value=0).over("method", "seed"))


def divided(a: float, b: float) -> float:
    """a / b, where a loss that is not finite is infinitely worse than any, its like included."""
    if not math.isfinite(a) or (b == 0 and a > 0):
        return math.inf
    if b == 0 and a < 0:
        return -math.inf
    if not math.isfinite(b):
        return 0.0
    return 1.0 if a == b else a / b
