"""Joint readings of the paper: their runs, and the claims that they reproduce."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pages import curves_of, write_run

from lossguard.curves import COUNTERS
from lossguard.experiments.readings import (
    ALL,
    COLORS,
    JUDGED,
    Judged,
    Reading,
    draw_readings,
    judge_readings,
)
from lossguard.experiments.recipes import POLICIES, READ, READINGS
from lossguard.records import Record

Losses = dict[str, float | dict[int, float]]
"""By method: a loss, or the losses from some steps on."""


def record(name: str, scaling: str, losses: Losses, **settings: str | int) -> Record:
    """Of two seeds and 1,000 steps."""
    steps, rows = np.arange(1, 1_001), []
    for method, curve in losses.items():
        points = curve if isinstance(curve, dict) else {1: curve}
        values = [points[max(k for k in points if k <= step)] for step in steps]
        columns = {"step": steps, "loss": values, "used_learned": 0.0}
        one = pl.DataFrame(columns | dict.fromkeys(COUNTERS, steps))
        rows += [one.with_columns(method=pl.lit(method), seed=pl.lit(seed)) for seed in (0, 1)]
    config = {"name": name, "scaling": scaling, "methods": [*losses], "seeds": 2, "seed": 0}
    return Record(config | settings, {}, pl.concat(rows))


PARTS: Losses = {"SGDnm": 1.0, "Adam": 1.0, "L2O": 0.5, "GL2O, weight": 0.9, "GL2O, decay": 0.6}
GUARDS: Losses = {"LGL2O, keep": {1: 0.5, 300: 0.6}, "LGL2O, reset": 0.5}
FOLDERS = {
    Path("a"): record("reading-fig03-unit", "unit", PARTS | GUARDS),
    Path("b"): record("reading-fig03-symmetric", "symmetric", {"SGDnm": 1.0}),
    Path("c"): record("reading-fig05-none", "none", {"Adam": {1: 2.0, 100: 1.1}}),
    Path("d"): record("reading-fig05-standardized", "standardized", {"Adam": {1: 2.0, 100: 0.9}}),
    Path("e"): record("fig04", "none", {"L2O": 0.5, "GL2O (theta as decay)": 0.6}),
    Path("f"): record("fig04", "none", {"LGL2O": 0.6}, loser="reset in every cycle"),
    Path("g"): record("reading-fig04-none", "none", {"GL2O, weight": 0.4}),
}


@pytest.fixture(scope="module")
def judged() -> list[Judged]:
    return judge_readings(FOLDERS)


def test_each_reading_is_judged_by_its_own_methods_and_scalings(judged: list[Judged]) -> None:
    """A figure's own run speaks for the policy that it has."""
    found = {one.reading: {v.id: v.verdict for v in one.verdicts} for one in judged}
    assert {*found} == {*ALL} and {tuple(one) for one in found.values()} == {JUDGED}
    keep = found[Reading("unit", "none", "keep", "weight")]
    reset = found[Reading("unit", "standardized", "reset", "decay")]
    assert (keep["3c"], reset["3c"]) == ("not reproduced", "not run")  # which ends at 1,000
    assert (keep["3d"], reset["3d"]) == ("reproduced", "not reproduced")
    assert (keep["5b"], reset["5b"]) == ("reproduced", "not reproduced")
    assert (keep["4c"], reset["4c"]) == ("not reproduced", "not run")
    assert found[Reading("unit", "none", "keep", "decay")]["4c"] == "reproduced"
    assert (keep["4a"], reset["4a"]) == ("not run", "not run")
    every = found[Reading("symmetric", "none", "reset in every cycle", "weight")]
    assert every["4a"] == "reproduced"
    absent = found[Reading("symmetric", "none", "reset", "weight")]
    assert {absent[claim] for claim in ("3a", "3c", "3d", "4a")} == {"not run"}


def test_runs_with_other_settings_are_no_readings() -> None:
    judged = judge_readings(
        {
            Path("a"): record("fig03", "unit", {"SGDnm": 1.0, "L2O": 0.5}, learned="mlp-small"),
            Path("b"): record("fig04", "none", {"L2O": 0.5, "GL2O (theta as decay)": 0.6}, nc=100),
        }
    )
    assert all(one.counts["not run"] == len(JUDGED) for one in judged)


def test_readings_that_reproduce_more_come_first(judged: list[Judged]) -> None:
    counts = [one.counts["reproduced"] for one in judged]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert judged[0].reading[:3] == ("unit", "none", "reset in every cycle")
    assert str(judged[0]) == ", ".join(judged[0].reading) + ": 4 of 5"


def test_map_shows_the_claims_that_were_judged(judged: list[Judged]) -> None:
    (axes,) = draw_readings(judged).axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["3a", "3c", "3d", "4a", "4c", "5b"]
    drawn = np.asarray(axes.collections[0].get_array()).reshape(len(judged), len(names))
    for row, one in zip(drawn, judged, strict=True):
        outcome = {verdict.id: verdict.verdict for verdict in one.verdicts}
        assert [[*COLORS][code] for code in row] == [outcome[name] for name in names]


def test_command(main, tmp_path, capsys) -> None:
    run = write_run(
        tmp_path / "run", curves_of(["SGDnm"]), name="reading-fig03-unit", scaling="unit"
    )
    main("readings", run, "-o", tmp_path / "map.png")
    *readings, told = capsys.readouterr().out.splitlines()
    assert len(readings) == len(ALL) and all(line.endswith(": 0 of 0") for line in readings)
    assert told == f"figure: {tmp_path / 'map.png'}"
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_recipes_have_every_policy_and_both_thetas() -> None:
    assert len(READINGS) == sum(len(scalings) for _, scalings, *_ in READ.values())
    for name, recipe in READINGS.items():
        e = recipe()
        assert e.name == name and name.endswith(e.scaling)
        assert {f"LGL2O, {policy}" for policy in POLICIES} < {*e.methods}
        assert {"GL2O, weight", "GL2O, decay"} < {*e.methods}
