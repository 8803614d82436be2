"""Curves against a NumPy reference."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest

from lossguard.guards.protocol import Decision
from lossguard.runs import records
from lossguard.runs.curves import COUNTERS, divided, join, mark_loss, thin, totals

MEANS = ("loss", "used_learned", "learned_loss", "fallback_loss")


def made_up(seeds: int, cycles: int, nt: int) -> Decision:
    """Decisions [seeds, cycles, nt], drawn at random."""
    rng, shape = np.random.default_rng(0), (seeds, cycles)
    return Decision(
        used_learned=rng.random((*shape, nt)) < 0.5,
        losses=rng.normal(size=(*shape, nt)).astype(np.float32),
        learned_loss=rng.normal(size=shape).astype(np.float32),
        fallback_loss=rng.normal(size=shape).astype(np.float32),
        winner=np.zeros(shape, np.int32),
        gradients=np.full(shape, 2 * nt, np.int32),
        forwards=rng.integers(0, 9, shape).astype(np.int32),
        learned_updates=np.full(shape, nt, np.int32),
    )


def in_chunks(decisions: Decision, sizes: list[int]) -> list[pl.DataFrame]:
    """Thinned as a run thins them, a chunk of so many cycles at a time."""
    chunks, first = [], 0
    seeds, cycles, nt = decisions.losses.shape
    for size in sizes:
        part = jax.tree.map(lambda leaf, at=first, n=size: leaf[:, at : at + n], decisions)
        spent = totals(chunks[-1]) if chunks else None
        chunks.append(thin(part, np.full(seeds, nt * first), spent))
        first += size
    assert first == cycles
    return chunks


def end_of_bin(step: int) -> int:
    """Three significant digits, rounded up."""
    width = 10 ** max(0, len(str(step)) - 3)
    return math.ceil(step / width) * width


def reference(decisions: Decision) -> list[dict[str, Any]]:
    """The curves, one step at a time."""
    rows = []
    seeds, cycles, nt = decisions.losses.shape
    for seed in range(seeds):
        bins, step, spent = defaultdict(list), 0, dict.fromkeys(COUNTERS, 0)
        for cycle in range(cycles):
            for t in range(nt):
                step += 1
                share = (t + 1) / nt
                counters = {
                    name: before + share * float(getattr(decisions, name)[seed, cycle])
                    for name, before in spent.items()
                }
                values = {
                    "loss": decisions.losses[seed, cycle, t],
                    "used_learned": decisions.used_learned[seed, cycle, t],
                    "learned_loss": decisions.learned_loss[seed, cycle],
                    "fallback_loss": decisions.fallback_loss[seed, cycle],
                }
                bins[end_of_bin(step)].append({**values, **counters, "step": step})
            for name in spent:
                spent[name] += int(getattr(decisions, name)[seed, cycle])
        for entries in bins.values():
            means = {k: np.mean([e[k] for e in entries], dtype=np.float64) for k in MEANS}
            last = {k: entries[-1][k] for k in ("step", *COUNTERS)}
            rows.append({"seed": seed, **means, **last})
    return rows


@pytest.mark.parametrize(
    ("nt", "sizes"),
    [(10, [130]), (10, [1, 33, 7, 89]), (7, [145, 8, 22])],  # the last cut bins of ten steps
)
def test_curves_are_those_of_a_loop(nt: int, sizes: list[int]) -> None:
    """Also where a checkpoint has joined parts of them; the last bin ends where the run does."""
    decisions = made_up(3, sum(sizes), nt)
    *first, last = chunks = in_chunks(decisions, sizes)
    curves = join(chunks, "LGL2O")
    assert not first or join([pl.concat(first), last], "LGL2O").equals(curves)
    expected = pl.DataFrame(reference(decisions))
    assert curves["method"].unique().to_list() == ["LGL2O"]
    for name in ("seed", "step"):
        np.testing.assert_array_equal(curves[name], expected[name])
    for name in MEANS:
        np.testing.assert_allclose(curves[name], expected[name], rtol=1e-5, atol=1e-6)
    for name in COUNTERS:
        np.testing.assert_allclose(curves[name], expected[name], rtol=1e-12)


@pytest.mark.parametrize(
    ("last", "step"),
    [
        (1, 1),
        (999, 999),
        (1_000, 1_000),
        (1_001, 1_010),
        (9_999, 10_000),
        (10_000, 10_000),
        (99_999, 100_000),
        (1_000_000, 1_000_000),
        (1_000_001, 1_010_000),
        (10**9, 10**9),
    ],
)
def test_bins_hold_three_significant_digits(last: int, step: int) -> None:
    chunk = thin(made_up(1, 1, 1), np.array([last - 1]))
    assert chunk["step"].item() == step == end_of_bin(last)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_are_kept(bad: float, tmp_path: Path) -> None:
    decisions = made_up(2, 120, 10)
    np.asarray(decisions.losses)[0, 3, 4] = bad  # step 35, a bin of its own
    np.asarray(decisions.losses)[0, 110, 4] = bad  # step 1,105, in the bin 1,110
    records.write_parquet(tmp_path / "t", join(in_chunks(decisions, [120]), "m"))
    curves = records.read_parquet(tmp_path / "t").filter(pl.col("seed") == 0)
    spoiled = curves.filter(~pl.col("loss").is_finite())
    assert spoiled["step"].to_list() == [35, 1110]
    np.testing.assert_array_equal(spoiled["loss"], [bad, bad])


def test_mark_loss_against_a_hand_made_answer() -> None:
    steps = [1, 2, 9, 10, 20, 25]
    losses = [9.0, 9.0, 1.0, 3.0, 5.0, 8.0]
    curves = pl.concat(
        pl.DataFrame({"method": m, "seed": s, "step": steps, "loss": [add + x for x in losses]})
        for m, s, add in (("a", 0, 0.0), ("a", 1, 10.0), ("b", 0, 20.0))
    )
    # Step 9 stands for 3 .. 9, step 20 for 11 .. 20, step 25 for 21 .. 25.
    for k, expected in ((10, (1 + 3) / 2), (25, 8.0), (2, 9.0), (22, (5 + 2 * 8) / 3)):
        marks = mark_loss(curves, k)
        assert marks.columns == ["method", "seed", "loss"]
        assert marks.rows() == [
            ("a", 0, pytest.approx(expected)),
            ("a", 1, pytest.approx(10 + expected)),
            ("b", 0, pytest.approx(20 + expected)),
        ]


def test_losses_that_are_not_finite_are_infinitely_worse() -> None:
    answers = [divided(*pair) for pair in ((2, 4), (np.nan, 1), (1, np.nan), (1, np.inf), (1, 0))]
    assert answers == [0.5, np.inf, 0.0, 0.0, np.inf] and divided(np.inf, np.inf) == np.inf
    assert divided(-1, 0) == -np.inf and divided(0, 0) == 1


def test_mark_loss_averages_the_steps_that_were_taken() -> None:
    decisions = made_up(2, 251, 5)
    curves = join(in_chunks(decisions, [251]), "m")
    losses = np.asarray(decisions.losses, np.float64).reshape(2, -1)
    losses[:, 1120:1130] = losses[:, 1120:1130].mean(axis=1, keepdims=True)  # the bin 1,130
    for k, first in ((100, 90), (1000, 900), (1255, 1130)):
        marks = mark_loss(curves, k)["loss"].to_numpy()
        np.testing.assert_allclose(marks, losses[:, first - 1 : k].mean(axis=1), atol=1e-6)
