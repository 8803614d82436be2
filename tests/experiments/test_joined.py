"""Records put together from runs, and what is read from them: joint readings, and grids."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

from lossguard import records
from lossguard.curves import COUNTERS
from lossguard.experiments import figures
from lossguard.experiments.grids import CHOSEN, losses_of, over_best
from lossguard.experiments.joined import ENDS, Part, join
from lossguard.experiments.maps import COLORS, draw_grids, draw_readings
from lossguard.experiments.readings import (
    ALL,
    FIGURES,
    POLICIES,
    READINGS,
    Reading,
    judge_readings,
    restarting,
)
from lossguard.guards.unguarded import unguarded

Losses = Mapping[str, float | Mapping[int, float]]
"""By method: a loss, or the losses from some steps on."""


def table(losses: Losses, last: int = 1_000, seeds: int = 2) -> pl.DataFrame:
    steps = np.arange(1, last + 1)
    rows = []
    for method, curve in losses.items():
        points = curve if isinstance(curve, Mapping) else {1: curve}
        values = [points[max(k for k in points if k <= step)] for step in steps]
        for seed in range(seeds):
            columns = {"step": steps, "loss": values, "used_learned": 0.0}
            columns |= dict.fromkeys(COUNTERS, steps)
            one = pl.DataFrame(columns).with_columns(method=pl.lit(method), seed=pl.lit(seed))
            rows.append(one.select("method", "seed", *columns))
    return pl.concat(rows)


def run(folder: Path, losses: Losses, counts: Any = pl.Int64, **about: object) -> Path:
    """The records of a run, whose counters are whole numbers or not."""
    curves = table(losses).cast(dict.fromkeys(COUNTERS, counts))
    made = {
        "time": "now",
        "command": ["lossguard"],
        "commit": "0" * 40,
        "device": "",
        "versions": {},
    }
    config = {"name": "mine", "title": "", "methods": [*losses], "seeds": 2, "seed": 0}
    records.write_json(folder / records.CONFIG, config)
    records.write_parquet(folder / records.CURVES, curves)
    at_end = curves.filter(pl.col("step") == 1_000).select(
        "method", "seed", "step", test_loss="loss"
    )
    records.write_parquet(folder / records.EVALUATIONS, at_end)
    seconds = dict.fromkeys(losses, 1.0)
    records.write_json(folder / records.MANIFEST, {**made, "data": "", "seconds": seconds} | about)
    return folder


def record(losses: Losses) -> records.Record:
    config = {"name": "readings", "title": "Readings", "methods": [*losses]}
    return records.Record(config, {}, table(losses))


def test_joined_curves_are_means_over_bins(tmp_path: Path) -> None:
    one = run(tmp_path / "one", {"A": {1: 1.0, 101: 3.0, 121: 7.0}, "B": 2.0})
    two = run(tmp_path / "two", {"A": 4.0}, pl.Float64)
    parts = [Part("first", one, {"A": "C"}, 300), Part("second", two, {"A": "A"}, 300)]
    folder = join(parts, tmp_path / "joined", name="both", title="Both")
    config, made, curves = records.read_run(folder)
    assert config["methods"] == ["first: C", "second: A"] and config["steps"] == 300
    steps = [*range(1, 51), 60, 70, 80, 90, 100, 150, 200, 270, 300]
    assert curves.filter(method="first: C", seed=1)["step"].to_list() == steps
    bins = dict(curves.filter(method="first: C", seed=0).select("step", "loss").iter_rows())
    assert (bins[100], bins[150], bins[300]) == pytest.approx((1.0, (20 * 3 + 30 * 7) / 50, 7.0))
    assert (curves["gradients"] == curves["step"]).all()
    assert [part["methods"] for part in made["runs"]] == [["first: C"], ["second: A"]]
    assert (made["runs"][0]["steps"], made["runs"][0]["seeds"]) == (300, [0, 1])
    assert 1 in ENDS and 3 in ENDS and 9 in ENDS and 2.7 in ENDS  # the bounds of [0.9 k, k]


def test_runs_that_are_themselves_put_together_keep_what_made_them(tmp_path: Path) -> None:
    sources = [
        {"methods": ["A"], "seeds": [seed], "time": str(seed), "command": ["x"]} for seed in (0, 1)
    ]
    part = Part("first", run(tmp_path / "one", {"A": 1.0}, runs=sources), {"A": "A"}, 1_000)
    folder = join([part], tmp_path / "joined", name="one", title="")
    runs = records.read_run(folder).manifest["runs"]
    assert [(one["time"], one["seeds"]) for one in runs] == [("0", [0]), ("1", [1])]


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    part = Part("first", run(tmp_path / "one", {"A": 1.0}), {"A": "A"}, 300)
    with pytest.raises(ValueError, match=r"two have first: A$"):
        join([part, part], tmp_path / "joined", name="both", title="")
    lacking = dataclasses.replace(part, methods={"B": "B"})
    with pytest.raises(ValueError, match=r"^methods of .*one must have B$"):
        join([lacking], tmp_path / "joined", name="both", title="")
    assert not (tmp_path / "joined").exists()


def test_a_restarting_optimizer_is_a_fresh_one_every_so_often() -> None:
    def objective(params: jax.Array, i: jax.Array | int) -> jax.Array:
        return jnp.sum((params - i) ** 2)

    adam = optax.adam(0.1)
    guard, fresh = (unguarded(one, nt=3) for one in (restarting(adam, 3), adam))
    state = guard.init(jnp.ones(2))
    for _ in range(3):
        by_hand = fresh.init(state.params)._replace(minibatches=state.minibatches)
        by_hand, _ = fresh.step(by_hand, objective)
        state, _ = guard.step(state, objective)
        np.testing.assert_array_equal(state.params, by_hand.params)


def test_recipes_have_every_policy_and_both_thetas() -> None:
    assert len(READINGS) == sum(len(scalings) for scalings, _ in FIGURES.values())
    for name, recipe in READINGS.items():
        e = recipe()
        assert e.name == name and name.endswith(e.scaling)
        assert e.sgd_tau == e.guard_tau  # SGDnm is the fallback, alone
        assert {f"LGL2O, {policy}" for policy in POLICIES} < {*e.methods}
        assert {"GL2O, weight", "GL2O, decay"} < {*e.methods}


PARTS = {"SGDnm": 1.0, "Adam": 1.0, "L2O": 0.5, "GL2O, weight": 0.9, "GL2O, decay": 0.6}
READ: Losses = {
    **{f"fig03 unit: {method}": loss for method, loss in PARTS.items()},
    "fig03 unit: LGL2O, keep": {1: 0.5, 300: 0.6},
    "fig03 unit: LGL2O, reset": 0.5,
    "fig03 symmetric: SGDnm": 1.0,
    "fig05 none: Adam": {1: 2.0, 100: 1.1},
    "fig05 standardized: Adam": {1: 2.0, 100: 0.9},
}


def test_each_reading_is_judged_by_its_own_methods_and_scalings() -> None:
    judged = {
        one.reading: {v.id: v.verdict for v in one.verdicts} for one in judge_readings(record(READ))
    }
    assert {*judged} == {*ALL}
    assert {len(one) for one in judged.values()} == {5 + 4 + 5}  # claims about figures 3, 4, 5
    keep = judged[Reading("unit", "none", "keep", "weight")]
    reset = judged[Reading("unit", "standardized", "reset", "decay")]
    assert (keep["3c"], reset["3c"]) == ("not reproduced", "not run")  # which ends at 1,000
    assert (keep["3d"], reset["3d"]) == ("reproduced", "not reproduced")
    assert (keep["5b"], reset["5b"]) == ("reproduced", "not reproduced")
    absent = judged[Reading("symmetric", "none", "keep", "weight")]
    assert {absent[claim] for claim in ("3a", "3c", "3d", "4a")} == {"not run"}


def test_readings_that_reproduce_more_come_first() -> None:
    judged = judge_readings(record(READ))
    counts = [one.counts()["reproduced"] for one in judged]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert judged[0].reading[:2] == ("unit", "none") and judged[0].reading.theta == "weight"


def test_map_of_readings_shows_the_claims_that_were_judged() -> None:
    judged = judge_readings(record(READ))
    (axes,) = draw_readings(record(READ)).axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["3a", "3c", "3d", "5b"]
    drawn = np.asarray(axes.images[0].get_array())
    for row, one in zip(drawn, judged, strict=True):
        outcome = {verdict.id: verdict.verdict for verdict in one.verdicts}
        assert [[*COLORS][code] for code in row] == [outcome[name] for name in names]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == ", ".join(judged[0].reading) + ": 3 of 4"


GRID: Losses = {
    "mnist-mlp unit: SGDnm tau 20000": 2.0,
    "mnist-mlp unit: SGDnm tau 50000": 1.0,
    "mnist-mlp unit: Adam 0.001": {1: 9.0, 270: 4.0, 301: 0.1},
    "mnist-mlp unit: Adam 0.01": 5.0,
    "mnist-mlp symmetric: Adam 0.01": 1.0,
}


def test_grids_are_judged_at_step_300() -> None:
    losses = losses_of(record(GRID))["mnist-mlp", "unit"]
    found = over_best(losses)
    assert [*found.values()] == pytest.approx([2.0, 1.0, 1.0, 1.25])
    assert {method for method, ratio in found.items() if ratio == 1} == {*CHOSEN["mnist-mlp"]}


def test_map_of_grids_boxes_what_the_paper_chose(tmp_path: Path) -> None:
    (axes,) = draw_grids(record(GRID)).axes
    frames: Any = axes.patches
    boxes = [(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in frames]
    assert sorted(boxes) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [text.get_text() for text in axes.texts] == ["2", "1", "1", "1.25", "", "", "", "1"]
    file = figures.plot(tmp_path, record(GRID)._replace(config={"name": "grids", "title": "G"}))
    assert file.stat().st_size > 0
