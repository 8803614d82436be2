"""Joint readings of the paper: their runs, and the claims that they reproduce."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pages import curves_of, write_run

from benchmarks.readings import (
    ABOUT,
    COLORS,
    IMAGES,
    JUDGED,
    LEARNED,
    POINTS,
    POLICIES,
    READINGS,
    RULES,
    counts,
    draw_readings,
    judge_readings,
    main,
)
from lossguard.runs.config import as_config
from lossguard.runs.curves import COUNTERS
from lossguard.runs.records import Record

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
    config |= {"figure": name} if name.startswith("fig") else {}
    return Record(config | settings, {}, pl.concat(rows))


PARTS: Losses = {"SGDnm": 1.0, "Adam": 1.0, "L2O": 0.5, "GL2O, weight": 0.9, "GL2O, decay": 0.6}
GUARDS: Losses = {"LGL2O, keep": {1: 0.5, 300: 0.6}, "LGL2O, reset": 0.5}
FOLDERS = {
    Path("a"): record("reading-fig03-unit", "unit", PARTS | GUARDS),
    Path("b"): record("reading-fig03-symmetric", "symmetric", {"SGDnm": 1.0}),
    Path("c"): record("reading-fig05-none", "none", {"Adam": {1: 2.0, 100: 1.1}}),
    Path("d"): record("reading-fig05-standardized", "standardized", {"Adam": {1: 2.0, 100: 0.9}}),
    Path("e"): record(
        "fig04", "none", {"L2O": 0.5, "GL2O (theta as decay)": 0.6, "GL2O (every step)": 0.7}
    ),
    Path("f"): record("fig04", "none", {"LGL2O": 0.6}, loser="reset in every cycle"),
    Path("g"): record("reading-fig04-none", "none", {"GL2O, weight": 0.4}),
    Path("h"): record("reading-fig06-unit", "unit", {"SGDnm": 1.0, "LGL2O, keep": 1.0}),
    Path("i"): record("fig06", "unit", {"L2O": {1: 1.0, 900: 9.0}, "GL2O": 1.0}),
    Path("j"): record("fig08", "unit", {"L2O": {1: 1.0, 900: 9.0}}),
}


@pytest.fixture(scope="module")
def judged() -> pl.DataFrame:
    return judge_readings(FOLDERS)


def outcomes(judged: pl.DataFrame) -> dict[str, dict[str, str]]:
    """By the part as it is drawn: what became of each claim."""
    found: dict[str, dict[str, str]] = {}
    for inputs, about, claim, verdict in judged.rows():
        found.setdefault(f"{inputs}, {about}", {})[claim] = verdict
    return found


def test_each_part_is_judged_by_its_own_methods_and_scaling(judged: pl.DataFrame) -> None:
    """A figure's own run speaks for the policy and the rule that it has."""
    found = outcomes(judged)
    assert len(found) == (len(IMAGES) + len(POINTS)) * (1 + len(POLICIES) + len(RULES))
    names = {name for of in found.values() for name in of}
    assert (
        names == {one.id for one in JUDGED} == {n for _, of in ABOUT.values() for n in of.split()}
    )
    yes, no, none = "reproduced", "not reproduced", "not run"
    assert found["images, unit, LGL2O, keep"] == {
        "3c": no, "3e": none, "6c": yes, "7c": none, "8c": none
    }  # fmt: skip
    assert found["images, unit, LGL2O, reset"]["3c"] == none  # which ends at 1,000
    assert [found[f"images, unit, GL2O, {rule}"]["3d"] for rule in RULES] == [yes, no, none, none]
    assert [found[f"images, unit, GL2O, {rule}"]["6b"] for rule in RULES] == [no, none, none, none]
    assert found["images, unit, L2O"] == {"3b": none, "6a": yes, "7a": none, "8a": yes}
    assert [found[f"points, {one}, L2O"]["5b"] for one in POINTS] == [yes, no]
    assert [found[f"points, none, GL2O, {rule}"]["4c"] for rule in RULES] == [no, yes, yes, none]
    assert [found[f"points, none, LGL2O, {one}"]["4a"] for one in POLICIES] == [none, none, yes]
    assert {*found["images, symmetric, LGL2O, reset"].values()} == {none}
    assert {*found["images, standardized, L2O"].values()} == {none}


def test_runs_with_other_settings_are_no_readings() -> None:
    judged = judge_readings(
        {
            Path("a"): record("fig03", "unit", {"SGDnm": 1.0, "L2O": 0.5}, figure=""),
            Path("b"): record("fig04", "none", {"L2O": 0.5, "GL2O (theta as decay)": 0.6}, nc=100),
        }
    )
    assert {*judged["verdict"]} == {"not run"}


def test_claims_are_counted(judged: pl.DataFrame) -> None:
    """Of images 3a, 6a and 8a, not 3d, of points 4a, 4c and 5b."""
    found = {row.pop("about"): row for row in counts(judged).to_dicts()}
    assert [*found["L2O"].values()] == ["2 of 2", "0 of 0", "0 of 0", "1 of 1", "0 of 1"]
    assert found["LGL2O, keep"]["images, unit"] == "1 of 2"
    assert found["GL2O, weight"]["images, unit"] == "2 of 3"
    assert found["LGL2O, reset in every cycle"]["points, none"] == "1 of 1"


def test_map_shows_the_claims_that_were_judged(judged: pl.DataFrame) -> None:
    found, panels = outcomes(judged), draw_readings(judged).axes
    drawn = [[one.get_text() for one in axes.get_xticklabels()] for axes in panels]
    assert drawn == [["3a", "3c", "3d", "6a", "6b", "6c", "8a"], ["4a", "4c", "5b"]]
    for axes, names, kind in zip(panels, drawn, ("images", "points"), strict=True):
        rows = [one.get_text() for one in axes.get_yticklabels()]
        assert rows == [row for row in found if row.startswith(kind)]
        codes = np.ma.asarray(axes.collections[0].get_array()).reshape(len(rows), len(names))
        shown = [[None if c is np.ma.masked else [*COLORS][c] for c in row] for row in codes]
        assert shown == [[found[row].get(name) for name in names] for row in rows]


def test_command(tmp_path, capsys) -> None:
    curves, about = FOLDERS[Path("a")].curves, {"name": "reading-fig03-unit", "scaling": "unit"}
    config = as_config(READINGS["fig03-unit"]())
    run = write_run(tmp_path / "run", curves, **(config | about | {"methods": [*PARTS, *GUARDS]}))
    main([str(run), "--out", str(tmp_path / "map.png")])
    assert 0 < capsys.readouterr().out.count("0 of 0") < (3 + 2) * (1 + 3 + 4)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_no_reading_leave_the_map_as_it_is(tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", curves_of(["SGDnm"]), name="mine")
    (tmp_path / "map.png").write_text("precious")
    with pytest.raises(SystemExit):
        main([str(run), "--out", str(tmp_path / "map.png")])
    assert capsys.readouterr().err == "none of these runs is one of a reading\n"
    assert (tmp_path / "map.png").read_text() == "precious"


def test_recipes_have_every_policy_and_every_rule() -> None:
    for name, recipe in READINGS.items():
        e, (figure, *about) = recipe(), name.split("-")
        assert e.name == f"reading-{name}" and (e.scaling in about or e.dataset in about)
        assert (e.learned == LEARNED["paper"]) == (about[-1] == "paper")
        assert tuple(e.guards()) == e.names()
        if figure == "fig02":
            assert (e.names(), e.steps) == (("L2O",), 100)
        elif figure == "fig09":
            assert {f"LGL2O over Adam 0.01, {policy}" for policy in POLICIES} < {*e.names()}
        else:
            for checks in ("", " (nc 100)"):
                assert {f"LGL2O, {policy}{checks}" for policy in POLICIES} < {*e.names()}
            assert {f"GL2O, {rule}" for rule in RULES} < {*e.names()}
