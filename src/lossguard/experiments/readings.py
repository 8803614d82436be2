"""Joint readings of what the paper leaves open, and the claims that each of them reproduces.

The paper states neither the scaling of inputs, nor what becomes of the losing branch's LSTM, nor
what GL2O's mu follows. Of these a claim depends on the scaling, and on the policy if it is about
LGL2O, or on the rule if it is about GL2O. So it is judged once for each part of a reading, and a
joint reading is one of each: a scaling of images, one of points, one policy, one rule.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..config import as_config
from ..records import Record
from .claims import CLAIMS, K, Verdict, judge_claims, tracks
from .evidence import figure_of
from .formulas import on
from .recipes import IMAGES, PAPERS, POINTS, POLICIES, READ, READINGS, RULES

SHORT = 1_000
"""Steps of the runs on ConvNets, up to which their LGL2O is judged here."""
ABOUT: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "L2O": ([""], ("3b", "4b", "5b", "5e", "6a", "7a", "8a")),
    "LGL2O": (POLICIES, ("3c", "3e", "4a", "5a", "5c", "5d", "6c", "7c", "8c")),
    "GL2O": ([*RULES], ("3a", "3d", "4c", "6b", "7b", "8b")),
}
"""By the method that claims are about: its variants, and the claims. Not 4d, which needs a million
steps and nc = 100."""
JUDGED = [
    claim._replace(judge=on(int(claim.id[0]), tracks(SHORT)))
    if claim.id in ("6c", "7c", "8c")
    else claim
    for claim in CLAIMS
    if any(claim.id in names for _, names in ABOUT.values())
]
OWN = {
    "weight": "GL2O",
    "decay": "GL2O (theta as decay)",
    "weight, every step": "GL2O (every step)",
}
"""GL2O by its rule in the figures' own runs."""
DECIDED = ("name", "title", "scaling", "loser", "adam_rate", "make_task", "make_methods")
"""What a reading sets in a config; in all else it has to be the recipe's."""
COLORS = {"reproduced": "#4a90c4", "not reproduced": "#e8a078", "not run": "#eeeeee"}
"""Of verdicts."""


class Part(NamedTuple):
    """What one scaling and one variant of a method make of the claims about that method."""

    scaling: str
    """One of ``IMAGES`` or, of points, of ``POINTS``; "standardized" is of both."""
    of_images: bool
    method: str
    """One of ``ABOUT``; L2O stands for SGDnm and Adam too."""
    variant: str
    """One of ``POLICIES`` or ``RULES``; nothing for L2O."""
    verdicts: Sequence[Verdict]

    @property
    def counts(self) -> tuple[int, int]:
        """Of how many claims it reproduces how many that were run."""
        outcomes = [one.verdict for one in self.verdicts]
        return outcomes.count("reproduced"), len(outcomes) - outcomes.count("not run")

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.scaling, self.method, self.variant)))


class Reading(NamedTuple):
    """What the paper leaves open, all of it decided, and the claims that it reproduces."""

    images: str
    """One of ``IMAGES``."""
    points: str
    """One of ``POINTS``."""
    policy: str
    """One of ``POLICIES``."""
    rule: str
    """One of ``RULES``."""
    reproduced: int
    judged: int

    def __str__(self) -> str:
        return f"{', '.join(self[:4])}: {self.reproduced} of {self.judged}"


def judge_readings(records: Mapping[Path, Record]) -> list[Part]:
    """Every part of a reading; curves speak up to step ``K``.

    Args:
        records: of the recipes in ``READINGS``, and of the figures that they read.
    """
    parts = []
    for of_images, scalings in ((True, IMAGES), (False, POINTS)):
        figures = [name for name, (_, own, *_) in READ.items() if (own is IMAGES) == of_images]
        for scaling, (method, (variants, names)) in product(scalings, ABOUT.items()):
            claims = [one for one in JUDGED if one.id in names and f"fig0{one.id[0]}" in figures]
            for variant in variants:
                found = {
                    folder: _as_the_figure(record, method, variant)
                    for folder, record in records.items()
                    if _figure(record) in figures and record.config.get("scaling") == scaling
                }
                verdicts = judge_claims({f: one for f, one in found.items() if one}, claims)
                parts.append(Part(scaling, of_images, method, variant, verdicts))
    return parts


def joint_readings(parts: Sequence[Part]) -> list[Reading]:
    """Those that reproduce the most claims first."""
    counts = {part[:4]: part.counts for part in parts}
    readings = []
    for images, points, policy, rule in product(IMAGES, POINTS, POLICIES, RULES):
        chosen = [
            counts[scaling, of_images, method, variant]
            for scaling, of_images in ((images, True), (points, False))
            for method, variant in (("L2O", ""), ("LGL2O", policy), ("GL2O", rule))
        ]
        reproduced, judged = map(sum, zip(*chosen, strict=True))
        readings.append(Reading(images, points, policy, rule, reproduced, judged))
    return sorted(readings, key=lambda one: -one.reproduced)


def _figure(record: Record) -> str | None:
    """The figure that a record reads, or is of; its own runs of figure 8 have other pixels."""
    name = record.config["name"]
    if name in READINGS:
        return name.split("-")[1]
    return figure_of(name) if name != "fig08" else None


def _as_the_figure(record: Record, method: str, variant: str) -> Record | None:
    """The record as one of the figure's recipe; None if it has none of the methods.

    The figure's own runs have one policy, some of the rules, and Adam at other rates.
    """
    config, made, curves = record
    figure = str(_figure(record))
    recipe = PAPERS[figure]()
    names = {"SGDnm": "SGDnm", "L2O": "L2O", "Adam 0.01": "Adam 0.01"}
    if config["name"] == figure:
        names |= {OWN[variant]: "GL2O"} if variant in OWN else {}
        names |= {"LGL2O": "LGL2O"} if variant == config.get("loser", recipe.loser) else {}
    else:
        adam = "Adam 0.01" if figure == "fig05" else "Adam"  # as claims call it
        names |= {"Adam": adam, f"{method}, {variant}": method}
    chosen = curves.filter(pl.col("method").is_in([*names]), pl.col("step") <= K)
    if config.get("nc", recipe.nc) != recipe.nc or chosen.is_empty():
        return None
    methods = [names[method] for method in config["methods"] if method in names]
    decided = {name: as_config(recipe)[name] for name in DECIDED}
    chosen = chosen.with_columns(pl.col("method").replace(names))
    return Record(config | decided | {"methods": methods}, made, chosen)


def draw_readings(parts: Sequence[Part]) -> Figure:
    """Each part of a reading, a row, against the claims that a record can judge, the columns."""
    sides = [[part for part in parts if part.of_images == of_images] for of_images in (True, False)]
    figure = Figure(figsize=(9, 1.5 + 0.19 * len(parts)), layout="constrained")
    ratios = [len(side) for side in sides]
    colors = ListedColormap([*COLORS.values()])
    for axes, side, title in zip(
        figure.subplots(2, height_ratios=ratios), sides, ("images", "points"), strict=True
    ):
        outcomes = [{one.id: one.verdict for one in part.verdicts} for part in side]
        run = {id for of in outcomes for id, verdict in of.items() if verdict != "not run"}
        shown = [claim.id for claim in JUDGED if claim.id in run]
        rows = [[[*COLORS, None].index(of.get(id)) for id in shown] for of in outcomes]
        codes = np.ma.masked_equal(np.array(rows), len(COLORS)).reshape(len(side), -1)
        axes.pcolormesh(codes, cmap=colors, vmin=0, vmax=len(COLORS) - 1, edgecolors="white")
        axes.invert_yaxis()
        axes.set_xticks(np.arange(len(shown)) + 0.5, shown)
        axes.xaxis.tick_top()
        axes.set_yticks(np.arange(len(side)) + 0.5, [str(part) for part in side], fontsize=7)
        axes.set_ylabel(title)
    patches = [Patch(color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle("Readings of the paper: claims about figures 3 to 8", fontsize=10)
    return figure
