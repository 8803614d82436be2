"""Each claim's formula on made-up curves for which the answer is known."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

from lossguard import records
from lossguard.config import as_config
from lossguard.curves import COUNTERS
from lossguard.experiments import theorems
from lossguard.experiments.claims import CLAIMS, Verdict, judge_claims, judge_run
from lossguard.experiments.evidence import FUNCTIONS
from lossguard.experiments.findings import Finding
from lossguard.experiments.folders import read_runs
from lossguard.experiments.recipes import PAPERS, SETS

Curve = float | Mapping[int, float]
"""A loss, or the losses from some steps on."""
SHORT = 3_000
"""Steps of a run that stops before any of the paper's lengths."""


@pytest.fixture(autouse=True)
def theorems_hold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and have a test of their own."""
    for name in ("theorem_5", "theorem_7"):
        monkeypatch.setattr(theorems, name, lambda: Finding(True, ""))


def marks(last: int) -> list[int]:
    all_marks = [100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000]
    return [k for k in all_marks if k <= last]


def write(
    folder: Path,
    recipe: str,
    curves: Mapping[str, Curve],
    *,
    last: int | None = None,
    each_seed: Sequence[float] = (0.5, 1.5),
    spent: Mapping[str, Mapping[str, float]] | None = None,
    **settings: Any,
) -> Path:
    """The records of a run: losses at step 1, at marks and at the last step, and none between.

    Each seed has so many times the losses.
    """
    methods = tuple(curves)
    e = replace(PAPERS[recipe](), seeds=len(each_seed), methods=methods, **settings)
    last = last or e.steps
    steps = sorted({1, *marks(last), last})
    tables = []
    for method, curve in curves.items():
        points = curve if isinstance(curve, Mapping) else {1: curve}
        losses = np.array([points[max(k for k in points if k <= step)] for step in steps])
        for seed, factor in enumerate(each_seed):
            counters = (spent or {}).get(method, {})
            tables.append(
                pl.DataFrame({"step": steps, "loss": factor * losses}).select(
                    pl.lit(method).alias("method"),
                    pl.lit(seed).alias("seed"),
                    "step",
                    "loss",
                    pl.lit(0.0).alias("used_learned"),
                    *((counters.get(name, 0.0) * pl.col("step")).alias(name) for name in COUNTERS),
                )
            )
    records.open_folder(folder, as_config(replace(e, steps=last)))
    seconds = dict.fromkeys(methods, 1.0)
    records.write_json(folder / records.MANIFEST, {"data": "", "seconds": seconds})
    records.write_parquet(folder / records.CURVES, pl.concat(tables))
    return folder


def judged(claim: str, *folders: Path) -> Verdict:
    (verdict,) = (v for v in judge_claims(read_runs(folders)[0]) if v.id == claim)
    return verdict


THREE: dict[str, Curve] = {"SGDnm": 1.0, "L2O": 2.0, "LGL2O": 1.09}
FIVE: dict[str, Curve] = THREE | {"Adam": 3.0, "GL2O": 1.0}
OTHERS_DIVERGE: dict[str, Curve] = {
    "SGDnm": 1.0,
    "L2O": {1: 1.0, 2: 9.0},  # before the first mark
    "GL2O": {1: 1.0, 300: 2.01},
}
NINE: dict[str, Curve] = {
    "LGL2O over SGDnm 3": 1.0,
    "LGL2O over SGD 3": 1.0,
    "LGL2O over Adam 0.1": 0.9,
}
GRID: dict[str, Curve] = dict.fromkeys(PAPERS["fig10"]().methods, 1.06)

# Claim, recipe, losses of a run to the paper's length that holds, and changes by which it fails.
CASES: dict[str, tuple[str, dict[str, Curve], Sequence[dict[str, Curve]]]] = {
    "C3a": (
        "fig03",
        FIVE | {"L2O": {1: 9.0, 100: 0.9, 1_000: 9.0}},
        [
            {"L2O": {1: 9.0, 100: 0.9, 300: 1.0}},
            {"L2O": {1: 9.0, 300: 0.9}},
            {"Adam": {1: 3.0, 300: 0.8, 1_000: 3.0}},
            {"L2O": math.nan},
        ],
    ),
    "C3b": (
        "fig03",
        FIVE | {"L2O": {1: 0.1, 200_000: 1.01}},
        [{"L2O": {1: 2.0, 200_000: 0.99}}, {"SGDnm": math.nan}],
    ),
    "C3c": (
        "fig03",
        THREE | {"L2O": {1: 0.5, 300: 4.0}, "LGL2O": {1: 0.54, 300: 1.09}},
        [
            {"LGL2O": 1.09},
            {"LGL2O": {1: 0.54, 300: 1.09, 1_000: 1.11, 3_000: 1.0}},
            {"LGL2O": {1: 0.54, 100_000: math.inf}},
            dict.fromkeys(THREE, math.nan),
        ],
    ),
    "C3d": (
        "fig03",
        {"L2O": 0.8, "GL2O": 0.9, "SGDnm": 1.0},
        [{"L2O": 0.95}, {"GL2O": 1.0}, {"GL2O": math.nan}],
    ),
    "C4": (
        "fig04",
        FIVE | {"LGL2O": {1: 1.09, 30_000: 9.0}, "GL2O": {1: 1.1, 1_000: 0.1}},
        [{"LGL2O": {1: 1.09, 10_000: 1.11}}, {"GL2O": {1: 1.1, 300: 1.08}}],
    ),
    "C5a": ("fig05", {"SGDnm": 3.1, "LGL2O": 1.0}, [{"SGDnm": 2.9}, {"LGL2O": math.nan}]),
    "C5b": (
        "fig05",
        THREE | {"LGL2O": {1: 9.0, 100_000: 0.89}},
        [
            {"LGL2O": {1: 0.5, 300_000: 0.91, 1_000_000: 0.5}},
            {"LGL2O": {1: 9.0, 100_000: 0.95, 300_000: 0.5}},
            {"L2O": {1: 9.0, 1_000_000: 0.9}},
        ],
    ),
    **{
        claim: (
            recipe,
            OTHERS_DIVERGE | {"LGL2O": 1.04},
            [
                {"LGL2O": 1.06},
                {"LGL2O": 0.94},
                {"LGL2O": math.nan, "SGDnm": math.nan},
                {"LGL2O": {1: 1.0, 3_000: 1.06, 10_000: 1.0}},
                {"L2O": {1: 1.0, 300: 1.9}},
                {"GL2O": {1: 1.0, 300: 9.0, 30_000: 1.0}},
            ],
        )
        for claim, recipe in (("C6", "fig06"), ("C7", "fig07"))
    },
    "C8": (
        "fig08",
        OTHERS_DIVERGE | {"LGL2O": 1.04, "GL2O": {1: 1.0, 100: math.nan}},
        [{"GL2O": {1: 1.0, 300: 1e30}}, {"LGL2O": 1.06}, {"L2O": 1.0}],
    ),
    "C9": (
        "fig09",
        NINE,
        [{"LGL2O over Adam 0.1": loss} for loss in (1.0, 1.1, math.nan)],
    ),
    "C10": (
        "fig10",
        GRID | {"SGDnm 0.01 tau 50000": 1.0, "SGDnm 1 tau 2000": math.nan},
        [{"SGDnm 0.01 tau 20000": 1.04}, dict.fromkeys(GRID, math.inf)],
    ),
    **{
        f"C12{letter}": (
            recipe,
            THREE | {"LGL2O": {1: 1.09, 3_000: 0.5, 10_000: 1.11, 30_000: 9.0}},
            [
                {"LGL2O": {1: 1.09, 3_000: 0.5, 10_000: 1.11}, "SGDnm": 0.4},
                {"LGL2O": {1: 1.09, 1_000: 1.11}},
                {"LGL2O": {1: 0.4, 100: 1.11}},
            ],
        )
        for letter, recipe in zip("abcde", SETS["table2"], strict=True)
    },
    "C15": (
        "fig05",
        {"LGL2O": {1: 1.0, 300: 0.5, 1_000_000: 0.99}, "L2O": {1: 1.0, 3_000: 7.0}},
        [
            {"LGL2O": {1: 1.0, 300: 0.5, 30_000: 1.01, 100_000: 0.5}},
            {"LGL2O": {1: 1.0, 1_000_000: math.nan}},
        ],
    ),
}


@pytest.mark.parametrize("claim", CASES)
def test_claim(claim: str, tmp_path: Path) -> None:
    recipe, curves, failing = CASES[claim]
    holds = judged(claim, write(tmp_path / "holds", recipe, curves))
    assert holds.outcome == "holds", holds.measured
    for number, changes in enumerate(failing):
        fails = judged(claim, write(tmp_path / f"fails{number}", recipe, curves | changes))
        assert fails.outcome == "fails", (changes, fails.measured)


EARLY = {"C3a", "C3d"}
"""What a run of 3,000 steps can settle, if it holds."""


@pytest.mark.parametrize("claim", CASES)
def test_what_was_not_reached_is_not_run(claim: str, tmp_path: Path) -> None:
    recipe, curves, _ = CASES[claim]
    short = min(SHORT, PAPERS[recipe]().steps - 100)
    verdict = judged(claim, write(tmp_path / "short", recipe, curves, last=short))
    assert verdict.outcome == ("holds" if claim in EARLY else "not run"), verdict.measured
    shortest = judged(claim, write(tmp_path / "shortest", recipe, curves, last=90))
    assert shortest.outcome == "not run"
    assert judged(claim).outcome == "not run"
    assert judged(claim, write(tmp_path / "other", "demo", curves)).outcome == "not run"


def test_a_mark_that_fails_decides_a_short_run(tmp_path: Path) -> None:
    curves = THREE | {"LGL2O": {1: 1.0, 1_000: 2.5, 3_000: 1.0}}
    verdict = judged("C3c", write(tmp_path / "run", "fig03", curves, last=SHORT))
    assert verdict.outcome == "fails"
    assert verdict.measured == (
        "LGL2O over the better of its parts is 2.5 at worst, at step 1,000, fails first at 1,000 "
        "(checked to 3,000, not to 100,000)"
    )


@pytest.mark.parametrize(
    ("claim", "changes", "outcome"),
    [
        ("C3b", {"L2O": {1: 0.1, 300_000: 1.01}}, "holds"),
        ("C3c", {"LGL2O": {1: 0.54, 300: 1.09, 300_000: 1.11}}, "fails"),
        ("C6", {"L2O": {1: 1.0, 300: 9.0, 300_000: 1.9}}, "fails"),
    ],
)
def test_a_run_beyond_the_papers_length_is_judged_to_its_end(
    tmp_path: Path, claim: str, changes: dict[str, Curve], outcome: str
) -> None:
    recipe, curves, _ = CASES[claim]
    run = write(tmp_path / "run", recipe, curves | changes, last=300_000)
    assert judged(claim, run).outcome == outcome


@pytest.mark.parametrize(
    ("claim", "told"),
    [
        (
            "C6",
            "L2O ends at 9 times its least loss; GL2O ends at 2.01 times its least loss; "
            "the distance of LGL2O from SGDnm, relative to it, is 0.04 at worst, at step 100 "
            "(checked to 100,000)",
        ),
        (
            "C12b",
            "LGL2O over the better of its parts is 1.09 at worst, at step 100 (checked to 3,000); "
            "LGL2O diverges from step 10,000 on",
        ),
        (
            "C10",
            "best of 25 is SGDnm 0.01 tau 50000 with 1 at step 1,000; within 5 % of it: none",
        ),
        (
            "C15",
            "in run LGL2O over its least so far is 1.98 at worst, at step 1,000,000 (checked to "
            "1,000,000), L2O over its own 7",
        ),
    ],
)
def test_numbers_are_told(claim: str, told: str, tmp_path: Path) -> None:
    recipe, curves, _ = CASES[claim]
    assert judged(claim, write(tmp_path / "run", recipe, curves)).measured == told


@pytest.mark.parametrize(("ours", "outcome"), [(0.0, "holds"), (1e-30, "fails")])
def test_what_is_zero_tracks_what_is_zero(tmp_path: Path, ours: float, outcome: str) -> None:
    curves = OTHERS_DIVERGE | {"SGDnm": {1: 1.0, 300: 0.0}, "LGL2O": {1: 1.0, 300: ours}}
    assert judged("C6", write(tmp_path / "run", "fig06", curves)).outcome == outcome


FIRST: dict[str, float] = dict.fromkeys(SETS["fig02"], 0.59) | {
    "fig02-spirals": 0.61,
    "fig02-cifar10": 0.61,
}


@pytest.mark.parametrize(
    ("changes", "last", "outcome"),
    [
        ({}, 100, "holds"),
        ({"fig02-moons": 0.61}, 100, "fails"),
        ({"fig02-mnist": math.nan}, 100, "fails"),
        ({"fig02-spirals": 0.59}, 100, "fails"),
        ({"fig02-cifar10": math.nan}, 100, "holds"),
        ({}, 90, "not run"),
    ],
)
def test_first_steps(tmp_path: Path, changes: dict[str, float], last: int, outcome: str) -> None:
    folders = [
        write(tmp_path / name, name, {"L2O": {1: 2.0, 2: 2 * share}}, last=last)
        for name, share in (FIRST | changes).items()
    ]
    verdict = judged("C2", *folders)
    assert verdict.outcome == outcome
    if not changes and last == 100:
        told = "Loss(L2O, 100) over the initial loss: mnist 0.59; fashion_mnist 0.59; moons 0.59; "
        assert verdict.measured.startswith(told)
    assert judged("C2", *folders[1:]).outcome == "not run"


@pytest.mark.parametrize("initial", [math.inf, math.nan])
def test_no_optimizer_works_from_a_loss_that_is_not_finite(tmp_path: Path, initial: float) -> None:
    for name, share in FIRST.items():
        first = initial if name == "fig02-moons" else 2.0
        write(tmp_path / name, name, {"L2O": {1: first, 2: 2 * share}}, last=100)
    verdict = judged("C2", tmp_path)
    assert verdict.outcome == "fails"
    assert "; moons inf; " in verdict.measured


@pytest.mark.parametrize(
    ("meta_loss", "outcome"),
    [
        ([1e9, math.inf, 2.0, *[2.2] * 17], "holds"),
        ([1e9, *[2.4] * 19], "fails"),
        ([1e9, *[1.0] * 18, math.nan], "fails"),
        ([1e9, *[1.0] * 17, math.nan, 1.0], "fails"),
        ([math.nan] * 20, "fails"),
        ([9.0, *[1.0] * 17, 1.2, 1.4], "holds"),
    ],
)
def test_meta_training(tmp_path: Path, meta_loss: list[float], outcome: str) -> None:
    folder = tmp_path / "meta"
    records.open_folder(folder, {"name": "lstm-cifar10-conv"})
    records.write_json(folder / records.MANIFEST, {})
    validation = np.full((20, 30), 1.5)
    validation[:, 0] = 2.3
    table = {"meta_step": range(10, 201, 10), "meta_loss": meta_loss, "validation": validation}
    records.write_parquet(folder / records.CURVES, pl.DataFrame(table))
    verdict = judged("C11", folder)
    assert verdict.outcome == outcome
    if meta_loss[0] == 9:
        assert verdict.measured == (
            "the meta-loss starts at 9, is 1 at least and 1.3 over the last tenth of 200 "
            "meta-steps; initially an optimizee has 2.3"
        )
    assert judged("C11").outcome == "not run"


COSTS = {
    "LGL2O": {"gradients": 2.0, "forwards": 2.0, "learned_updates": 1.0},
    "GL2O": {"gradients": 2.0, "learned_updates": 1.0},
}


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "holds"),
        ({"LGL2O": {"gradients": 3.0, "forwards": 2.0}}, "fails"),
        ({"LGL2O": {"gradients": 2.0, "forwards": 1.0}}, "fails"),
        ({"GL2O": {"gradients": 1.0}}, "fails"),
        ({"GL2O": {"gradients": 2.0, "forwards": 1.0}}, "fails"),
    ],
)
def test_costs(tmp_path: Path, changes: dict[str, dict[str, float]], outcome: str) -> None:
    curves = dict.fromkeys(COSTS, 1.0)
    folder = write(tmp_path / "run", "fig04", curves, last=SHORT, spent=COSTS | changes)
    verdict = judged("C13", folder)
    assert verdict.outcome == outcome
    assert "and 167 us" in verdict.measured  # a second for 2 seeds and 3,000 steps
    ours = (COSTS | changes)["LGL2O"]
    spent = f"LGL2O {ours['gradients']:g} gradients, {ours['forwards']:g} forward passes and "
    assert spent in verdict.measured
    assert judged("C13").outcome == "not run"


def test_theorems(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold for SGD with steps that are short enough, and not beyond."""
    monkeypatch.undo()
    assert judged("C14").outcome == "holds"
    problem = theorems._problem()
    excess = theorems._play(problem, problem, optax.sgd(-0.1), optax.sgd(2.1 / problem.L))
    assert excess[-1] > excess[0]
    assert not theorems._finding("theorem 5", {"one": 0.1, "another": math.nan}).holds


def test_bounds_are_those_of_the_theorems(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is on them at a single step holds, and one that is a little above doesn't.

    Theorem 7's has noise on the minibatches that train, the even ones.
    """
    monkeypatch.undo()
    problem, k = theorems._problem(), np.arange(1, theorems.STEPS + 1)
    w = theorems._start(problem)
    start = float(problem.excess(w))
    mu, L, k0 = 0.05, 2.0, 2 * 2.0 / 0.05
    bounds = {
        theorems.theorem_5: (1 - mu / L) ** k * start,
        theorems.theorem_7: max(k0 * start, 2 * L / mu**2) / (k + k0),
    }
    for theorem, bound in bounds.items():
        for step, (factor, holds) in product((1, theorems.STEPS), ((1.0, True), (1.01, False))):
            run = jnp.asarray(np.where(k == step, factor * bound, 0))
            noise = [theorem is theorems.theorem_7, False]

            def play(_, objective, *optimizers, run=run, noise=noise):
                found = jnp.array([objective(w, jnp.int32(i)) != problem(w) for i in (0, 1)])
                return jnp.where((found == jnp.array(noise)).all(), run, jnp.nan)

            monkeypatch.setattr(theorems, "_play", play)
            assert theorem.__wrapped__().holds == holds


def test_every_claim_once_and_in_order() -> None:
    verdicts = judge_claims({})
    ids = "C2 C3a C3b C3c C3d C4 C5a C5b C6 C7 C8 C9 C10 C11 C12a C12b C12c C12d C12e C13 C14 C15"
    assert [verdict.id for verdict in verdicts] == ids.split()
    assert [verdict[:4] for verdict in verdicts] == [claim[:4] for claim in CLAIMS]
    assert {verdict.outcome for verdict in verdicts if verdict.id != "C14"} == {"not run"}


GOOD: dict[str, Curve] = {"L2O": 0.8, "GL2O": 0.9, "SGDnm": 1.0}
BAD: dict[str, Curve] = GOOD | {"L2O": 1.0}


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ({}, {"each_seed": (1.0, 1.0, 1.0)}, "fails"),  # more seeds
        ({}, {"each_seed": (1.0,)}, "holds"),
        ({"last": 3_000}, {"each_seed": (1.0, 1.0, 1.0), "last": 300}, "fails"),
        ({}, {"each_seed": (1.0, 1.0, 1.0), "last": 10_000}, "holds"),  # but not of full length
        ({"last": 10_000}, {"each_seed": (1.0,)}, "fails"),
        ({"last": 3_000}, {"last": 10_000}, "fails"),  # longer
        ({}, {"last": 10_000}, "holds"),
        ({}, {}, "fails"),  # the last given
        ({}, {"seed": 100}, "holds"),  # other seeds
        ({}, {"loser": "reset"}, "holds"),  # other settings
        ({}, {"title": "Mine", "vectorize": True}, "fails"),
    ],
)
def test_which_run_speaks(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], outcome: str
) -> None:
    folders = [
        write(tmp_path / "first", "fig03", GOOD, **first),
        write(tmp_path / "second", "fig03", BAD, **second),
    ]
    assert judged("C3d", *folders).outcome == outcome


def test_the_last_given_speaks_though_it_is_in_a_folder_of_runs(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "fig03", GOOD)
    runs = write(tmp_path / "runs" / "one", "fig03", BAD).parent
    assert judged("C3d", run, runs).outcome == "fails"
    assert judged("C3d", runs, run).outcome == "holds"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_may_be_moved_since_the_run_but_not_be_anothers(
    tmp_path: Path, name: str
) -> None:
    run = write(tmp_path / "run", "fig03", GOOD)
    config = json.loads((run / records.CONFIG).read_text())
    for function, outcome in (
        ("lossguard.experiments.elsewhere:renamed", "holds"),
        ("mine:paper_methods", "not run"),
    ):
        records.write_json(run / records.CONFIG, config | {name: function})
        assert judged("C3d", run).outcome == outcome


def test_a_run_of_before_there_was_a_setting_speaks(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "fig03", GOOD)
    config = json.loads((run / records.CONFIG).read_text())
    del config["guard_tau"]
    records.write_json(run / records.CONFIG, config)
    assert judged("C3d", run).outcome == "holds"


def test_a_run_without_the_methods_does_not_speak(tmp_path: Path) -> None:
    more = write(tmp_path / "more", "fig03", {"Adam": 1.0}, each_seed=(1.0, 1.0, 1.0))
    run = write(tmp_path / "run", "fig03", GOOD)
    assert judged("C3d", run, more).outcome == "holds"
    assert judged("C3d", more).measured == (
        "no run of fig03 has its settings and the methods compared"
    )


def test_methods_that_are_not_the_recipes_lend_no_weight(tmp_path: Path) -> None:
    more = write(tmp_path / "more", "fig03", BAD | {"Recommended": 1.0})
    run = write(tmp_path / "run", "fig03", GOOD)  # the last given
    assert judged("C3d", more, run).outcome == "holds"


def test_one_run_speaks_for_all_claims_about_a_figure(tmp_path: Path) -> None:
    """If one has all methods at full length, and whatever shorter or smaller ones there are."""
    full = write(tmp_path / "full", "fig05", THREE)
    fewer = {name: THREE[name] for name in ("SGDnm", "LGL2O")}
    more_seeds = (1.0, 1.0, 1.0)
    others = [
        write(tmp_path / "fewer", "fig05", fewer, each_seed=more_seeds),
        write(tmp_path / "short", "fig05", FIVE, each_seed=more_seeds, last=SHORT),
    ]
    for folders in ([full, *others], [*others, full]):
        assert {judged(claim, *folders).folder for claim in ("C5a", "C5b")} == {full}


def test_a_million_steps_of_one_seed_count(tmp_path: Path) -> None:
    """For C15, beside a shorter run with all seeds; one that is not stable decides."""
    _, curves, (unstable, _) = CASES["C15"]
    long = write(tmp_path / "long", "fig03", curves, last=1_000_000, each_seed=(1.0,))
    short = write(tmp_path / "short", "fig03", curves)
    assert judged("C15", long, short).outcome == "holds"
    assert judged("C15", short).outcome == "not run"
    other = write(tmp_path / "other", "fig04", curves | unstable)
    both = judged("C15", long, other)
    assert both.outcome == "fails"
    assert both.measured.startswith("in long LGL2O over its least so far is ")
    assert "; in other LGL2O" in both.measured


def test_one_seed_that_is_not_finite_spoils_the_mean(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "fig03", GOOD)
    assert judged("C3d", run).outcome == "holds"
    table = records.read_parquet(run / records.CURVES)
    lost = pl.when(seed=1, method="L2O").then(math.nan).otherwise("loss")
    records.write_parquet(run / records.CURVES, table.with_columns(loss=lost))
    verdict = judged("C3d", run)
    assert verdict.outcome == "fails"
    assert verdict.measured == "L2O inf, GL2O 0.9, SGDnm 1 at step 100"


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(b"?")])
def test_damaged_records_are_named(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    run = write(tmp_path / "run", "fig03", GOOD)
    damage(run / records.CURVES)
    with pytest.raises(ValueError, match=r"curves\.parquet"):
        read_runs([run])


def test_what_one_run_says(tmp_path: Path) -> None:
    """The claims about it, as all of them are judged, and no others."""
    spirals = write(tmp_path / "spirals", "fig05", THREE)
    verdicts = judge_run(spirals, records.read_run(spirals))
    assert [one.id for one in verdicts] == ["C5a", "C5b", "C15"]
    assert verdicts == [judged(one.id, spirals) for one in verdicts]
    demo = write(tmp_path / "demo", "demo", THREE)
    assert judge_run(demo, records.read_run(demo)) == []


RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.skipif(not RESULTS.is_dir(), reason="there are no records here")
def test_committed_records_are_judged_as_when_they_were_made() -> None:
    """So that no change of the code silently takes a record's voice."""
    found, committed = {}, {}
    runs, others = read_runs([RESULTS])
    assert not others
    for folder, record in runs.items():
        file = folder / records.VERDICTS
        told = json.loads(file.read_text()) if file.exists() else {}
        committed[folder.name] = {claim: verdict["outcome"] for claim, verdict in told.items()}
        found[folder.name] = {one.id: one.outcome for one in judge_run(folder, record)}
    assert found == committed
