"""Readings of what the paper leaves open, and the claims that each of them reproduces.

    python -m benchmarks.readings results results/readings          judge what was run
    python -m benchmarks.readings runs/readings --run fig05-none    run some into that folder first

The paper states neither the scaling of inputs, nor what becomes of the losing branch's LSTM, nor
what GL2O's mu follows. Of these a claim depends on the scaling, and on the policy if it is about
LGL2O, or on the rule if it is about GL2O. So it is judged once for each scaling and each of these.
A joint reading is one scaling of images, one of points, one policy, one rule.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import optax
import polars as pl
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lossguard.cli.terminal import console, table
from lossguard.experiments import recipes
from lossguard.experiments.claims import CLAIMS, K, judge, tracks
from lossguard.experiments.evidence import labelled, of_curves
from lossguard.experiments.experiment import (
    Experiment,
    Methods,
    Policy,
    alone,
    every_step,
    guarded,
    learned_alone,
    rival,
    sgd_fallback,
)
from lossguard.experiments.sweep import sweep
from lossguard.guards.residual_guard import TrackingSequence, ema
from lossguard.runs.drawing import png
from lossguard.runs.files import write_whole
from lossguard.runs.records import Record, read_runs

POLICIES: Sequence[Policy] = get_args(Policy)
"""Of the LSTM's memory: kept by a branch that lost, fresh after a loss, or fresh in every cycle."""
RULES: Mapping[str, TrackingSequence] = {
    "weight": ema(0.9),
    "decay": ema(0.1),
    "weight, every step": every_step(ema(0.9)),
    "decay, every step": every_step(ema(0.1)),
}
"""Of GL2O's mu: what the paper's 0.9 is, and whether it follows accepted steps alone."""
IMAGES, POINTS = ("unit", "symmetric", "standardized"), ("none", "standardized")
"""Scalings. Points as they are lie within about [-1, 1]."""
SHAPES = (*POINTS, "two_spirals")
"""Of Spirals: the last one is another data set, as it is."""
LEARNED: Mapping[str, str] = {"": "lstm-mnist-mlp", "paper": "lstm-mnist-mlp-paper"}
"""Learned optimizers of figures 2 to 9, by what ends the name of a reading; the second one is
meta-trained by the paper's text, with nothing added."""
READ: Mapping[str, tuple[Callable[[], Experiment], Sequence[str], int, float]] = {
    "fig03": (recipes.fig03, IMAGES, 100_000, 0.001),
    "fig04": (recipes.fig04, POINTS, 100_000, 0.01),
    "fig05": (recipes.fig05, SHAPES, 100_000, 0.01),
    "fig06": (recipes.fig06, IMAGES, 1_000, 0.01),
    "fig07": (recipes.fig07, IMAGES, 1_000, 0.001),
    "fig08": (recipes.fig08, IMAGES, 1_000, 0.001),
    "fig09": (recipes.fig09, SHAPES, 120_000, 0.01),
    "fig12": (recipes.fig12, ("symmetric",), 100_000, 0.001),
    "fig13": (recipes.fig13, ("symmetric",), 100_000, 0.01),
    "fig14": (recipes.fig14, ("none",), 100_000, 0.01),
    "fig15": (recipes.fig15, ("none",), 100_000, 0.01),
    "fig16": (recipes.fig16, ("symmetric",), 100_000, 0.001),
}
"""Figures that are run in several scalings, these, their steps, and Adam's rate in appendix E."""


def reading(figure: str, inputs: str, learned: str) -> Experiment:
    """A figure of ``READ`` with one sort of inputs, its methods in every policy and by every rule.

    ``learned`` is a key of ``LEARNED``, "" in figures of the other learned optimizer.
    """
    recipe, _, steps, rate = READ[figure]
    e = recipe()
    shape = {"dataset": inputs, "scaling": "none"} if inputs == SHAPES[-1] else {"scaling": inputs}
    return replace(
        e,
        name="-".join(filter(None, ("reading", figure, inputs, learned))),
        figure="",
        steps=steps,
        adam_rate=rate,
        methods=(),
        make_methods=fallback_readings if figure == "fig09" else reading_methods,
        title=f"{e.title}: readings, inputs {inputs}",
        learned=LEARNED[learned] if learned else e.learned,
        **shape,
    )


def first_reading(dataset: str, inputs: str, learned: str) -> Experiment:
    """Figure 2's first steps on a data set, with one sort of inputs."""
    e = recipes.fig02(dataset)
    name = "-".join(filter(None, ("reading", "fig02", dataset, inputs, learned)))
    scaling, learned = ("none" if inputs == SHAPES[-1] else inputs), LEARNED[learned]
    dataset = inputs if inputs == SHAPES[-1] else dataset
    return replace(e, name=name, figure="", dataset=dataset, scaling=scaling, learned=learned)


def reading_methods(e: Experiment) -> Methods:
    """The paper's methods; LGL2O by policies and check minibatches, GL2O by rules."""
    sgd = sgd_fallback(e)
    return {
        "SGDnm": alone(e, sgd),
        "Adam": alone(e, optax.adam(e.adam_rate)),
        "L2O": learned_alone(e),
        **{f"GL2O, {name}": rival(e, sequence) for name, sequence in RULES.items()},
        **{f"LGL2O, {policy}": guarded(replace(e, loser=policy), sgd) for policy in POLICIES},
        **{
            f"LGL2O, {policy} (nc 100)": guarded(replace(e, loser=policy, nc=100), sgd)
            for policy in POLICIES
        },
    }


def fallback_readings(e: Experiment) -> Methods:
    """Figure 9's methods by policies."""
    return {
        f"{name}, {policy}": method
        for policy in POLICIES
        for name, method in recipes.fallback_methods(replace(e, loser=policy)).items()
    }


READINGS: Mapping[str, Callable[[], Experiment]] = {
    "-".join(filter(None, (figure, inputs, learned))): partial(reading, figure, inputs, learned)
    for figure, (_, sorts, _, _) in READ.items()
    for inputs in sorts
    for learned in (LEARNED if figure <= "fig09" else [""])
} | {
    "-".join(filter(None, ("fig02", dataset, inputs, learned))): partial(
        first_reading, dataset, inputs, learned
    )
    for dataset in recipes.FIRST
    for inputs in {"moons": POINTS, "circles": POINTS, "spirals": SHAPES}.get(dataset, IMAGES)
    for learned in LEARNED
}
"""By the folders of their records."""

SHORT = 1_000
"""Steps of the runs on ConvNets, up to which their LGL2O is judged here."""
ABOUT: Mapping[str, tuple[tuple[str, ...], str]] = {
    "L2O": (("",), "3b 4b 5b 5e 6a 7a 8a"),
    "LGL2O": (tuple(POLICIES), "3c 3e 4a 5a 5c 5d 6c 7c 8c"),
    "GL2O": (tuple(RULES), "3a 3d 4c 6b 7b 8b"),
}
"""By the method that claims are about, where L2O stands for SGDnm and Adam too: its variants, and
the claims. Not 4d, which needs a million steps and nc = 100."""
JUDGED = [
    claim._replace(formulas=[tracks(SHORT)]) if claim.id in ("6c", "7c", "8c") else claim
    for claim in CLAIMS
    if any(claim.id in names.split() for _, names in ABOUT.values())
]
OWN = {
    "weight": "GL2O",
    "decay": "GL2O (theta as decay)",
    "weight, every step": "GL2O (every step)",
}
"""GL2O by its rule in the figures' own runs."""
SETTINGS = ("dataset", "learned")
"""What is not judged here unless it is the figure's."""
COLORS = {"reproduced": "#4a90c4", "not reproduced": "#e8a078", "not run": "#eeeeee"}
"""Of verdicts."""


def judge_readings(records: Mapping[Path, Record]) -> pl.DataFrame:
    """What becomes of each claim in each part of a reading.

    Args:
        records: of readings, and of the figures that they read; curves speak up to step ``K``.

    Returns:
        Columns ``inputs``, as "images, unit"; ``about``, as "LGL2O, keep"; ``claim``; ``verdict``.
    """
    rows = []
    for kind, scalings in (("images", IMAGES), ("points", POINTS)):
        for scaling, (method, (variants, names)) in product(scalings, ABOUT.items()):
            for variant in variants:
                tables: dict[str, list[pl.DataFrame]] = {}
                for name, one in _as_the_figures(records, method, variant, scaling):
                    tables.setdefault(name, []).append(one)
                evidence = {name: of_curves(own) for name, own in tables.items()}
                about = ", ".join(filter(None, (method, variant)))
                rows += [
                    (f"{kind}, {scaling}", about, one.id, judge(one, evidence).verdict)
                    for one in JUDGED
                    if one.id in names.split() and READ[one.figures[0]][1][0] in scalings
                ]
    return pl.DataFrame(rows, ["inputs", "about", "claim", "verdict"], orient="row")


def _as_the_figures(
    records: Mapping[Path, Record], method: str, variant: str, scaling: str
) -> Iterator[tuple[str, pl.DataFrame]]:
    """Figures and curves of one scaling, with methods named as claims call them.

    A figure's own runs have one policy, some of the rules, and Adam at other rates.
    """
    for record in records.values():
        config = record.config
        own = config["name"].removeprefix("reading-") not in READINGS
        name = str(config.get("figure") if own else config["name"].split("-")[1])
        if name not in READ or config.get("scaling") != scaling:
            continue
        recipe = recipes.PAPERS[name]()
        if any(config.get(s, getattr(recipe, s)) != getattr(recipe, s) for s in SETTINGS):
            continue
        labels = {"SGDnm": "SGDnm", "L2O": "L2O", "Adam 0.01": "Adam 0.01"}
        if not own:
            adam = "Adam 0.01" if name == "fig05" else "Adam"  # as claims call it
            labels |= {"Adam": adam, f"{method}, {variant}": method}
        elif variant in OWN:
            labels |= {OWN[variant]: "GL2O"}
        elif variant == config.get("loser", recipe.loser):
            labels |= {"LGL2O": "LGL2O"}
        curves = record.curves.filter(pl.col("method").is_in([*labels]), pl.col("step") <= K)
        if config.get("nc", recipe.nc) == recipe.nc and not curves.is_empty():
            yield name, labelled(record._replace(curves=curves), labels)


def counts(judged: pl.DataFrame) -> pl.DataFrame:
    """Of ``judge_readings``: a row for each ``about``, a column for each scaling of inputs.

    A cell says how many claims are reproduced, of those run, as "4 of 5".
    """
    verdict = pl.col("verdict")
    reproduced, run = (verdict == "reproduced").sum(), (verdict != "not run").sum()
    cells = judged.group_by("inputs", "about", maintain_order=True).agg(
        cell=pl.format("{} of {}", reproduced, run)
    )
    return cells.pivot("inputs", index="about", values="cell")


def draw_readings(judged: pl.DataFrame) -> Figure:
    """Each part of a reading, a row, against the claims that a record can judge, the columns."""
    parts = judged.pivot("claim", index=("inputs", "about"), values="verdict")
    sides = [parts.filter(pl.col("inputs").str.starts_with(kind)) for kind in ("images", "points")]
    figure = Figure(figsize=(9, 1.5 + 0.19 * len(parts)), layout="constrained")
    colors = ListedColormap([*COLORS.values()])
    panels = figure.subplots(2, height_ratios=[*map(len, sides)])
    for axes, side in zip(panels, sides, strict=True):
        run = [one.id for one in JUDGED if {*side[one.id].drop_nulls()} - {"not run"}]
        codes = [[[*COLORS, None].index(verdict) for verdict in row] for row in side[run].rows()]
        codes = np.ma.masked_equal(np.array(codes), len(COLORS)).reshape(len(side), -1)
        axes.pcolormesh(codes, cmap=colors, vmin=0, vmax=len(COLORS) - 1, edgecolors="white")
        axes.invert_yaxis()
        axes.set_xticks(np.arange(len(run)) + 0.5, run)
        axes.xaxis.tick_top()
        rows = [", ".join(row) for row in side["inputs", "about"].rows()]
        axes.set_yticks(np.arange(len(side)) + 0.5, rows, fontsize=7)
    patches = [Patch(color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle("Readings of the paper: claims about figures 3 to 8", fontsize=10)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for, and judge; ``arguments`` are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readings", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", type=Path, nargs="+", help="of records, and of such folders")
    parser.add_argument("--run", nargs="+", default=[], choices=READINGS, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--steps", type=int, help="in place of the reading's")
    parser.add_argument("--methods", nargs="+", default=[], help="in place of all")
    parser.add_argument("--out", type=Path, default=Path("readings.png"), help="the map")
    asked = parser.parse_args(arguments)
    given = {"seeds": asked.seeds, "seed": asked.seed, "methods": tuple(asked.methods)}
    given |= {"steps": asked.steps} if asked.steps else {}
    experiments = {name: replace(READINGS[name](), **given) for name in asked.run}
    for outcome in sweep(experiments, asked.folders[0]):
        print(f"{outcome.name}: {outcome.state} {outcome.reason}")
    records, others = read_runs(asked.folders)
    print(*others, sep="\n", end="\n" if others else "")
    judged = judge_readings(records)
    if (judged["verdict"] == "not run").all():
        parser.exit(1, "none of these runs is one of a reading\n")
    write_whole(asked.out, png(draw_readings(judged)), "a figure", make_folder=True)
    found = counts(judged)
    console().print(table(found.columns, found.rows(), title="claims reproduced, of those run"))


if __name__ == "__main__":
    main()
