"""Each claim's formula on made-up curves for which the answer is known, both ways."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_run import leave

from benchmarks.readings import READINGS
from lossguard.experiments.claims import CLAIMS, Verdict, judge_claims
from lossguard.experiments.evidence import MARKS, gather
from lossguard.experiments.price import RECIPES
from lossguard.experiments.recipes import PAPERS, SETS
from lossguard.runs import records
from lossguard.runs.config import as_config
from lossguard.runs.curves import COUNTERS

Curve = float | Mapping[int, float]
"""A loss, or the losses from some steps on."""
Curves = Mapping[str, Curve]
Runs = list[tuple[str, dict[str, Curve], dict[str, Any]]]
"""Recipe, losses, and more arguments of ``write``."""


def write(
    folder: Path,
    recipe: str,
    curves: Curves,
    *,
    last: int | None = None,
    each_seed: Sequence[float] = (0.5, 1.5),
    used: float = 0.0,
    spent: Mapping[str, Sequence[float]] | None = None,
    test_loss: float = 0.5,
    **settings: Any,
) -> Path:
    """The records of a run to the recipe's length, with losses at marks and a few steps more.

    Each seed has so many times the losses; ``spent`` is gradients and forward passes a step.
    """
    methods = tuple(curves)
    e = replace(PAPERS[recipe](), seeds=len(each_seed), methods=methods, **settings)
    last = last or e.steps
    steps = sorted({k for k in (1, 20, 50, 600, 50_000, 120_000, *MARKS) if k < last} | {last})
    tables = []
    for method, curve in curves.items():
        points = curve if isinstance(curve, Mapping) else {1: curve}
        losses = np.array([points[max(k for k in points if k <= step)] for step in steps])
        counts = dict(zip(COUNTERS, (spent or {}).get(method, ()), strict=False))
        columns = {name: counts.get(name, 0.0) * np.array(steps) for name in COUNTERS}
        columns |= {"method": method, "step": steps, "used_learned": used}
        for seed, factor in enumerate(each_seed):
            tables.append(pl.DataFrame(columns | {"seed": seed, "loss": factor * losses}))
    on_test = (0, 900, 99.0), (0, 1_000, test_loss), (1, 1_000, test_loss)
    evaluated = [(m, seed, k // 10, k, loss) for m in methods for seed, k, loss in on_test]
    names = ["method", "seed", "cycle", "step", "test_loss"]
    made = {"data": "", "seconds": dict.fromkeys(methods, 1.0)}
    config = as_config(replace(e, steps=last))
    evaluations = pl.DataFrame(evaluated, names, orient="row")
    return leave(folder, config, pl.concat(tables), made, evaluations)


def judged(claim: str, *folders: Path) -> Verdict:
    (verdict,) = (v for v in judge_claims(records.read_runs(folders)[0]) if v.id == claim)
    return verdict


TWO: dict[str, Curve] = {"SGDnm": 1.0, "L2O": 2.0}
RIVALS: dict[str, Curve] = {"SGDnm": 1.0, "Adam": 1.0, "GL2O": 1.0}
GRID: dict[str, Curve] = dict.fromkeys(PAPERS["fig10"]().names(), 1.06)
NINE: dict[str, Curve] = {"LGL2O over SGDnm 3": 1.0, "LGL2O over Adam 0.01": 0.9}
SPENT = {"LGL2O": (2.0, 2.0), "GL2O": (2.0, 0.0)}

# Claim, recipe, losses by which it is reproduced, and changes by which it is not.
CASES: dict[str, tuple[str, dict[str, Curve], Sequence[Curves]]] = {
    "3a": (
        "fig03",
        RIVALS | {"L2O": {1: 0.9, 1_000: 2.0}},
        [
            {"L2O": {1: 0.9, 300: 1.0}},
            {"L2O": {1: 1.0, 100: 0.9}},
            {"Adam": {1: 1.0, 100: 0.8, 300: 1.0}},
            {"GL2O": 0.8},
            {"GL2O (theta as decay)": 0.8},
            {"L2O": math.nan},
        ],
    ),
    "3b": (
        "fig03",
        TWO | {"L2O": {1: 0.1, 100_000: 1.01}},
        [{"L2O": {1: 2.0, 100_000: 0.99, 200_000: 2.0}}, {"SGDnm": math.inf}],
    ),
    "3c": (
        "fig03",
        TWO | {"L2O": {1: 0.5, 300: 4.0}, "LGL2O": {1: 0.54, 300: 1.09, 200_000: 9.0}},
        [
            {"LGL2O": 1.09},
            {"LGL2O": {1: 0.54, 300: 1.09, 1_000: 1.11, 3_000: 1.0}},
            {"LGL2O": {1: 0.54, 100_000: math.inf}},
            {"LGL2O": math.nan, "L2O": math.nan, "SGDnm": math.nan},
        ],
    ),
    "3d": (
        "fig03",
        {"L2O": 0.6, "GL2O": 0.9, "SGDnm": 1.0},
        [{"L2O": 0.64}, {"GL2O": 1.0}, {"GL2O": math.nan}],
    ),
    "4a": (
        "fig04",
        {"LGL2O": {1: 9.0, 100: 1.49, 3_000: 9.0}, "L2O": 1.0},
        [{"LGL2O": {1: 1.0, 300: 1.51, 1_000: 1.0}}, {"LGL2O": math.nan}],
    ),
    "4b": (
        "fig04",
        {"L2O": {1: 9.0, 1_000: 1.0, 100_000: 2.1}},
        [{"L2O": {1: 9.0, 1_000: 1.0, 100_000: 1.9, 300_000: 9.0}}],
    ),
    "4c": (
        "fig04",
        {"GL2O": {1: 1.1, 1_000: 0.1}, "L2O": 1.0},
        [{"GL2O": {1: 1.1, 300: 0.9}}, {"GL2O": {1: 0.9, 300: 1.1}}],
    ),
    "5a": ("fig05", {"SGDnm": 3.1, "LGL2O": 1.0}, [{"SGDnm": 2.9}, {"LGL2O": math.nan}]),
    "5c": (
        "fig05",
        {"LGL2O": {1: 1.4, 100_000: 9.0}, "L2O": 1.0},
        [{"LGL2O": {1: 1.4, 30_000: 1.6}}, {"LGL2O": {1: 1.6, 100: 1.4}}],
    ),
    "5d": (
        "fig05",
        TWO | {"LGL2O": {1: 9.0, 100_000: 0.89, 300_000: 9.0}},
        [{"LGL2O": {1: 0.5, 100_000: 0.91}}, {"L2O": {1: 9.0, 100_000: 0.9}}],
    ),
    "5e": ("fig05", {"L2O": {1: 1.0, 20: 1.6, 50: 1.0}}, [{"L2O": {1: 1.0, 20: 1.4, 100: 9.0}}]),
    **{
        f"{n}a": (
            f"fig{n:02}",
            {"L2O": {1: 1.0, 1_000: 1.1}},
            [{"L2O": {1: 1.0, 30: 0.6, 1_000: 0.9, 3_000: 9.0}}],
        )
        for n in (6, 7, 8)
    },
    **{
        f"{n}b": (
            f"fig{n:02}",
            {"GL2O": {1: 1.0, 30: 0.3, 1_000: 0.7}},
            [{"GL2O": 1.0}, {"GL2O": {1: 1.0, 30: 0.6, 1_000: 0.9, 3_000: math.nan}}],
        )
        for n in (6, 7, 8)
    },
    **{
        f"{n}c": (
            f"fig{n:02}",
            {"SGDnm": 1.0, "LGL2O": {1: 9.0, 100: 1.04, 3_000: 0.2}},
            [{"LGL2O": {1: 1.0, 300: 1.06, 1_000: 1.0}}, {"LGL2O": {1: 1.0, 100_000: math.nan}}],
        )
        for n in (6, 7, 8)
    },
    "9": ("fig09", NINE, [{"LGL2O over Adam 0.01": loss} for loss in (1.0, 1.1, math.nan)]),
    "10": (
        "fig10",
        GRID | {"SGDnm 0.01 tau 50000": 1.0, "SGDnm 1 tau 2000": math.nan},
        [{"SGDnm 0.1 tau 20000": 0.99}],
    ),
    "12a": (
        "fig12",
        {"LGL2O": {1: 9.0, 3_000: 0.9, 100_000: 9.0}, "L2O": {1: 9.0, 300: 1.0, 1_000: 9.0}},
        [{"LGL2O": {1: 9.0, 3_000: 1.1}}, {"LGL2O": {1: 9.0, 200_000: 0.9}}],
    ),
    "13a": (
        "fig13",
        TWO | {"LGL2O": {1: 9.0, 1_000: 0.9, 100_000: 9.0}},
        [{"LGL2O": {1: 0.9, 30_000: 1.1}}, {"LGL2O": {1: 0.1, 1_000: 1.0, 3_000: 0.9}}],
    ),
    "14a": (
        "fig14",
        {"SGDnm": 3.1, "GL2O": 3.1, "LGL2O": 1.0},
        [{"SGDnm": 2.9}, {"GL2O": {1: 9.0, 50_000: 2.9, 100_000: 9.0}}],
    ),
    "14b": (
        "fig14",
        {"LGL2O": {1: 9.0, 10_000: 0.9, 300_000: 9.0}, "L2O": 1.0},
        [{"LGL2O": {1: 9.0, 10_000: 1.1, 30_000: 0.9}}, {"LGL2O": {1: 0.3, 10_000: 0.9}}],
    ),
    "15": (
        "fig15",
        {"L2O": 0.8, "LGL2O": 0.8, "GL2O": 0.9, "SGDnm": {1: 1.0, 10_000: 0.1}},
        [{"L2O": 0.95}, {"LGL2O": 0.95}, {"GL2O": 1.1}, {"GL2O": {1: 0.9, 3_000: 0.7}}],
    ),
    "16": (
        "fig16",
        {"LGL2O": {1: 9.0, 100_000: 0.9}, "L2O": 1.0, "GL2O": 1.0, "SGDnm": 1.0},
        [{"L2O": 0.8}, {"GL2O": 0.8}, {"SGDnm": 0.8}, {"LGL2O": {1: 0.4, 100_000: 0.9}}],
    ),
}


@pytest.mark.parametrize("claim", CASES)
def test_claim(claim: str, tmp_path: Path) -> None:
    recipe, curves, failing = CASES[claim]
    steps = max(PAPERS[recipe]().steps, 1_000 if recipe == "fig10" else 100_000)
    found = judged(claim, write(tmp_path / "good", recipe, curves, last=steps))
    assert found.verdict == "reproduced", found.numbers
    assert found.seeds == "2" and 0 < found.mark <= steps
    for number, changes in enumerate(failing):
        folder = write(tmp_path / f"bad{number}", recipe, curves | changes, last=steps)
        assert judged(claim, folder).verdict == "not reproduced", (changes, judged(claim, folder))


@pytest.mark.parametrize("claim", CASES)
def test_what_was_not_reached_is_not_run(claim: str, tmp_path: Path) -> None:
    recipe, curves, _ = CASES[claim]
    assert judged(claim, write(tmp_path / "other", "demo", curves)).verdict == "not run"
    shortest = write(tmp_path / "shortest", recipe, curves, last=29)
    assert judged(claim, shortest).verdict == "not run"
    less = dict([*curves.items()][1:])
    if less:  # without one of the methods that it compares
        assert judged(claim, write(tmp_path / "less", recipe, less)).verdict == "not run"


@pytest.mark.parametrize(
    ("claim", "recipe", "curves"),
    [("3c", "fig03", TWO | {"LGL2O": 1.0}), ("7c", "fig07", {"SGDnm": 1.0, "LGL2O": 1.0})],
)
def test_a_mark_that_fails_decides_and_one_that_is_missing_leaves_it_open(
    tmp_path, claim, recipe, curves
) -> None:
    """Claims about all marks, by a run to 3,000."""
    open_ = judged(claim, write(tmp_path / "open", recipe, curves, last=3_000))
    assert (open_.verdict, open_.mark) == ("not run", 3_000)
    bad = curves | {"LGL2O": {1: 1.0, 1_000: 2.5, 3_000: 0.1}}
    found = judged(claim, write(tmp_path / "bad", recipe, bad, last=3_000))
    assert found.verdict == "not reproduced"


def test_of_each_mark_the_most_seeds_speak(tmp_path: Path) -> None:
    """Of both methods, in one order: five to 3,000, of which one goes on."""
    short_run = {"SGDnm": 1.0, "LGL2O": 1.0}
    write(tmp_path / "five", "fig07", short_run, last=3_000, each_seed=[1, 1, 1, 1, 1])
    write(tmp_path / "one", "fig07", {"SGDnm": 1.0, "LGL2O": {1: 6.0, 10_000: 1.0}}, each_seed=[1])
    found = judged("7c", tmp_path)
    assert found.seeds == "5, 1 from 10,000" and found.mark == 100_000
    told = "LGL2O over SGDnm: at most 2 (1 to 4), at 100; 1 at 100,000; fails at 100 first"
    assert found.numbers == told
    assert found.verdict == "not reproduced"


def test_methods_are_compared_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    """LGL2O is better on the first seed, and worse on the mean of all of its own."""
    write(tmp_path / "ours", "fig05", {"LGL2O": 1.0}, each_seed=[1, 9, 9], last=100_000)
    write(tmp_path / "theirs", "fig05", {"L2O": 1.2}, each_seed=[1], last=100_000)
    found = judged("5c", tmp_path)
    assert (found.verdict, found.seeds) == ("reproduced", "1")


def test_later_seeds_are_others(tmp_path: Path) -> None:
    both: Curves = {"SGDnm": 4.0, "LGL2O": 1.0}
    write(tmp_path / "first", "fig05", both, last=100_000)
    write(tmp_path / "second", "fig05", both, last=100_000, seed=2)
    write(tmp_path / "third", "fig05", both, last=100_000, seed=3)
    assert judged("5a", tmp_path).seeds == "5"


@pytest.mark.parametrize(("figure", "verdict"), [("fig05", "reproduced"), ("", "not run")])
def test_a_run_of_no_figure_does_not_speak(tmp_path, figure, verdict) -> None:
    both: Curves = {"SGDnm": 4.0, "LGL2O": 1.0}
    assert judged("5a", write(tmp_path / "run", "fig05", both, figure=figure)).verdict == verdict


def late(few: Curve, many: Curve | None = None, reach: int = 1_000_000, **few_more: Any) -> Runs:
    """LGL2O with ten check minibatches, and with a hundred, as if figure FIG were the claim's."""
    hundred = [] if many is None else [("FIG", {"LGL2O": many}, {"last": reach, "nc": 100})]
    return [("FIG", {"LGL2O": few}, {"last": 1_000_000} | few_more), *hundred]


def million(changes: Mapping[tuple[str, int], Curve | None]) -> Runs:
    both = {(figure, nc): 1.0 for figure in ("fig03", "fig04", "fig05") for nc in (10, 100)}
    return [
        (figure, {"LGL2O": curve}, {"last": 1_000_000, "nc": nc})
        for (figure, nc), curve in (both | dict(changes)).items()
        if curve is not None
    ]


def first_steps(**changes: float | None) -> Runs:
    ratios = {"mnist": 0.1, "fashion_mnist": 0.3, "moons": 0.4, "circles": 0.7, "spirals": 0.8}
    found = ratios | {"cifar10": 0.9} | changes
    return [
        (f"fig02-{name}", {"L2O": {1: 2.0, 100: 2 * ratio}}, {"last": 100})
        for name, ratio in found.items()
        if ratio is not None
    ]


def horizon(end: float, *test_losses: float) -> Runs:
    figures = zip(("fig16", "fig13"), test_losses, strict=False)
    curves = {"L2O": {1: 1.0, 600: end}}
    return [(name, curves, {"last": 1_000, "test_loss": loss}) for name, loss in figures]


def one(figure: str, curves: Curves, **options: Any) -> Runs:
    return [(figure, dict(curves), options)]


RISING = {1: 9.0, 1_000: 1.0, 100_000: 3.0}
STEADY = {1: 9.0, 1_000: 1.0, 100_000: 1.9}
OVER = dict.fromkeys(SPENT, 1.0)
# Claims about several runs, or about more than losses.
SEVERAL: list[tuple[str, str, Runs]] = [
    *(
        (claim, verdict, [(figure, *run) for _, *run in runs])
        for claim, figure in (("4d", "fig04"), ("12b", "fig12"), ("13b", "fig13"))
        for verdict, runs in (
            ("reproduced", late(RISING, STEADY)),
            ("reproduced", late({1: 9.0, 1_000: 1.0, 30_000: math.nan}, 1.0)),
            ("not reproduced", late(RISING, {1: 9.0, 1_000: 1.0, 100_000: 2.1})),
            ("not reproduced", late({1: 9.0, 300: 1.0, 1_000: 9.0, 3_000: 1.0}, 1.0)),  # comes back
            ("not run", late(RISING, STEADY, 30_000)),  # not to the end
            ("not run", late(RISING)),
            ("not run", late(1.0, last=30_000)),
            ("not run", late({1: 1.0, 100: 5.0}, 1.0, last=30_000)),  # not late
        )
    ),
    ("A", "reproduced", million({})),
    ("A", "not reproduced", million({("fig04", 100): {1: 1.0, 1_000_000: 2.1}})),
    ("A", "not reproduced", million({("fig03", 10): {1: 1.0, 300: 0.4, 1_000_000: 0.9}})),
    ("A", "not run", million({("fig05", 100): None})),
    ("3e", "reproduced", one("fig03", {"LGL2O": 1.0}, used=0.09)),
    ("3e", "not reproduced", one("fig03", {"LGL2O": 1.0}, used=0.11)),
    ("3e", "not run", one("fig03", {"LGL2O": 1.0}, last=30_000)),
    ("5b", "reproduced", one("fig05", {"Adam": {1: 1.0, 1_000: 0.51}}, adam_rate=0.01)),
    ("5b", "not reproduced", one("fig05", {"Adam": {1: 1.0, 1_000: 0.49}}, adam_rate=0.01)),
    ("5b", "not run", one("fig05", {"Adam": {1: 1.0, 1_000: 0.51}})),  # not at the paper's rate
    ("2b", "reproduced", first_steps()),
    ("2b", "reproduced", first_steps(cifar10=math.nan)),
    ("2b", "not reproduced", first_steps(moons=0.85, spirals=0.9)),  # not below 0.8
    ("2b", "not reproduced", first_steps(spirals=0.69)),  # not the largest
    ("2b", "not reproduced", first_steps(circles=math.nan)),
    ("2b", "not run", first_steps(cifar10=None)),
    ("11b", "reproduced", horizon(0.9, 0.5, 0.9)),
    ("11b", "not reproduced", horizon(1.1, 0.5, 0.9)),
    ("11b", "not reproduced", horizon(0.9, 0.5, 1.1)),
    ("11b", "not run", horizon(0.9, 0.5)),  # one of two data sets
    ("11b", "not reproduced", horizon(1.1, 0.5)),
    ("S3", "reproduced", one("fig03", OVER, last=3_000, spent=SPENT)),
    *(
        ("S3", "not reproduced", one("fig03", OVER, last=3_000, spent=SPENT | {name: spent}))
        for name in SPENT
        for spent in ((3.0, 2.0), (2.0, 1.0), (1.0, 0.0))
    ),
]


@pytest.mark.parametrize(("claim", "verdict", "runs"), SEVERAL)
def test_claims_about_more(tmp_path: Path, claim: str, verdict: str, runs: Runs) -> None:
    for number, (recipe, curves, options) in enumerate(runs):
        write(tmp_path / f"{number}", recipe, curves, **options)
    found = judged(claim, tmp_path)
    assert found.verdict == verdict, found.numbers


def test_a_rise_that_other_seeds_might_not_show_has_its_interval(tmp_path: Path) -> None:
    for seed, end in enumerate((3.6, 1.0)):
        curves: dict[str, Curve] = {"LGL2O": {1: 9.0, 1_000: 1.0, 100_000: end}}
        write(tmp_path / f"{seed}", "fig04", curves, each_seed=(1.0,), seed=seed)
    assert judged("4d", tmp_path).numbers == (
        "LGL2O over its least: 2.3 (1 to 3.6) at 1,000,000; not judged: 2.3 at 100,000, 2.3 at "
        "300,000; no run has LGL2O (nc 100)"
    )


def test_a_reading_of_gl2o_is_enough(tmp_path: Path) -> None:
    """And one that was not run is passed over."""
    curves: dict[str, Curve] = {"L2O": 0.6, "GL2O": 2.0, "SGDnm": 1.0}
    assert judged("3d", write(tmp_path / "one", "fig03", curves)).verdict == "not reproduced"
    curves["GL2O (theta as decay)"] = 0.9
    found = judged("3d", write(tmp_path / "two", "fig03", curves))
    assert found.verdict == "reproduced"
    assert found.numbers.startswith("L2O over GL2O (theta as decay): 0.67 at 100; ")


def write_meta(
    folder: Path,
    name: str,
    meta_loss: Sequence[float],
    validation: Sequence[float],
    last: int,
    figure: str = "fig02",
    seed: int = 0,
) -> Path:
    steps = np.linspace(last / len(meta_loss), last, len(meta_loss)).astype(int)
    table = {"meta_step": steps, "meta_loss": meta_loss}
    table["validation"] = np.outer(validation, np.ones(30))
    config = {"name": name, "seed": seed, "figure": figure}
    return leave(folder, config, pl.DataFrame(table), {})


@pytest.mark.parametrize(
    ("validation", "verdict"),
    [
        ([2.0, *[1.0] * 17, 0.9, 0.95], "reproduced"),
        ([2.0, *[0.1] * 17, 1.0, 1.05], "not reproduced"),
        ([2.0, *[0.1] * 17, 0.8, 0.9], "not reproduced"),  # spread
        ([2.0, *[0.1] * 18, math.nan], "not reproduced"),
    ],
)
def test_meta_training_converges(tmp_path: Path, validation: list[float], verdict: str) -> None:
    run = write_meta(tmp_path / "run", "lstm-mnist-mlp-paper", [1.0] * 20, validation, 10_000)
    assert judged("2a", run).verdict == verdict
    short = write_meta(tmp_path / "short", "lstm-mnist-mlp-paper", [1.0] * 20, validation, 9_000)
    assert judged("2a", short).verdict == "not run"
    given = "lstm-mnist-mlp-paper", [1.0] * 20, validation, 10_000
    other = write_meta(tmp_path / "other", *given, figure="")
    assert judged("2a", other).verdict == "not run"


def test_meta_training_converges_by_the_mean_of_its_seeds(tmp_path: Path) -> None:
    """And of one that is shorter nothing is said."""
    name, loss = "lstm-mnist-mlp-paper", [1.0] * 20
    one = write_meta(tmp_path / "0", name, loss, [2.0, *[0.5] * 19], 10_000)
    two = write_meta(tmp_path / "1", name, loss, [2.0, *[1.4] * 19], 10_000, seed=1)
    short = write_meta(tmp_path / "2", name, loss, [2.0, *[9.0] * 19], 9_000, seed=2)
    both = judged("2a", one, two, short)
    assert (both.verdict, both.seeds) == ("reproduced", "2")
    assert both.numbers.endswith(
        "over the first: 0.47 (0.25 to 0.7) at 10,000; spread of that tenth: 0 at 10,000"
    )
    tables = [records.read_parquet(run / records.CURVES) for run in (one, two)]
    seeds = [table.with_columns(seed=k) for k, table in enumerate(tables)]
    together = leave(tmp_path / "both", {"name": name, "figure": "fig02"}, pl.concat(seeds), {})
    assert judged("2a", together) == both
    more = write_meta(tmp_path / "3", name, loss, [2.0, *[1.4] * 19], 10_000, seed=3)
    assert judged("2a", one, two, more).verdict == "not reproduced"


@pytest.mark.parametrize(
    ("meta_loss", "last", "verdict"),
    [
        ([210.0, math.inf, *[9.0] * 16, 1.9, 1.9], 10_000, "reproduced"),
        ([210.0, *[1.0] * 18, 2.1], 10_000, "not reproduced"),
        ([210.0, *[1.0] * 17, math.nan, 1.0], 10_000, "not reproduced"),
        ([190.0, *[1.0] * 19], 10_000, "not reproduced"),
        ([210.0, *[1.0] * 19], 9_000, "not run"),
    ],
)
def test_meta_training_explodes(tmp_path, meta_loss, last, verdict) -> None:
    run = write_meta(tmp_path / "run", "cifar10-conv-plain", meta_loss, [2.0] * 20, last)
    assert judged("11a", run).verdict == verdict


def test_claims_about_other_runs_are_one_line(tmp_path, main, capsys) -> None:
    write(tmp_path / "other", "demo", TWO)
    main("claims", tmp_path)
    assert capsys.readouterr().out.startswith("not run: 2a, 2b, 3a, ")
    write(tmp_path / "run", "fig05", {"SGDnm": 4.0, "LGL2O": 1.0})
    before = sorted(tmp_path.rglob("*"))
    main("claims", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    for part in ("5a", "reproduced", "\nnot run: 2a, 2b, 3a, "):
        assert part in out
    assert "5a" not in out.rpartition("not run: ")[2]


def test_numbers_are_told(tmp_path: Path) -> None:
    curves = {"SGDnm": 4.0, "LGL2O": {1: 1.0, 300_000: 8.0}, "L2O": 2.0}
    found = judged("5d", write(tmp_path / "run", "fig05", curves))
    assert found == Verdict(
        "5d",
        "5",
        "after 50,000 steps LGL2O is better than both its parts",
        "LGL2O over the best of L2O, SGDnm: 0.5 at 100,000; not judged: 4 at 300,000, 4 at "
        "1,000,000",
        "2",
        100_000,
        "reproduced",
    )


def test_an_interval_is_told_where_other_seeds_might_decide(tmp_path: Path) -> None:
    """Of five runs on Circles one is stuck: without it LGL2O would be level with L2O."""
    stuck, level = {"L2O": 1.0, "LGL2O": 9.0}, {"L2O": 1.0, "LGL2O": 1.0}
    one = write(tmp_path / "one", "fig04", stuck, each_seed=(1.0,))
    others = write(tmp_path / "others", "fig04", level, each_seed=4 * (1.0,), seed=1)
    verdict = judged("4a", one, others)
    assert verdict.verdict == "not reproduced" and verdict.seeds == "5"
    # The mean of five draws of (9, 1, 1, 1, 1): 33 % have no 9, and 1 % have four or more.
    assert verdict.numbers.startswith("LGL2O over L2O: 2.6 (1 to 5.8) at 100")
    decided = judged("4a", others)
    assert decided.verdict == "reproduced" and "(" not in decided.numbers


def test_the_last_step_at_which_l2o_leads_is_told(tmp_path: Path) -> None:
    curves = RIVALS | {"L2O": {1: 0.9, 1_000: 1.1}}
    told = judged("3a", write(tmp_path / "run", "fig03", curves)).numbers
    assert told.endswith("; last mark at which it leads SGDnm and Adam: 600 at 3,000")


def test_every_claim_is_tested_both_ways() -> None:
    tested = {*CASES, *(claim for claim, *_ in SEVERAL), "2a", "11a"}
    assert {claim.id for claim in CLAIMS} == tested
    assert {verdict.verdict for verdict in judge_claims({})} == {"not run"}


def test_figures_are_those_of_the_recipes() -> None:
    """A run of each recipe of a figure is gathered under its name, and no other."""
    assert gather({}) == {}
    assert not any(recipe().figure for recipe in (RECIPES | dict(READINGS)).values())
    for name in PAPERS:
        record = records.Record(as_config(PAPERS[name]()), {}, FLAT)
        expected = {name.partition("-")[0]} if name.startswith("fig") else set()
        assert {*gather({Path("run"): record})} == expected
    assert {f"fig{n:02}" for n in range(2, 17)} - {"fig11"} == {
        name.partition("-")[0] for name in PAPERS if name.startswith("fig")
    }
    assert len(SETS["fig02"]) == 6


FLAT = pl.DataFrame(
    {"method": ["L2O"], "seed": [0], "step": [1], "loss": [1.0], "used_learned": [0.0]}
    | {name: [1.0] for name in COUNTERS}
)
