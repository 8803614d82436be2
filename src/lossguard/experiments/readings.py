"""Joint readings of what the paper leaves open, and the claims that each of them reproduces.

The paper states neither the scaling of inputs, nor what becomes of the losing branch's LSTM, nor
which of two weights theta is. One run of a figure in one scaling holds its methods in all policies
and with both thetas; a reading picks one scaling of images, one of points, one policy, one theta.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
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
from .claims import K, Verdict, judge_claims
from .recipes import IMAGES, PAPERS, POINTS, POLICIES, RULES

JUDGED = ("3a", "3b", "3c", "3d", "3e", "4a", "4b", "4c", "5a", "5b", "5c", "5d", "5e")
"""Claims about figures 3 to 5, but 4d, which needs a million steps and nc = 100."""
DECIDED = ("name", "title", "scaling", "loser", "adam_rate", "make_methods")
"""What a reading sets in a config; in all else it has to be the recipe's."""
COLORS = {"reproduced": "#4a90c4", "not reproduced": "#e8a078", "not run": "#eeeeee"}
"""Of verdicts."""


class Reading(NamedTuple):
    """What the paper leaves open, all of it decided."""

    images: str
    """One of ``IMAGES``."""
    points: str
    """One of ``POINTS``."""
    policy: str
    """One of ``POLICIES``."""
    theta: str
    """One of ``RULES``."""


ALL = [Reading(*one) for one in product(IMAGES, POINTS, POLICIES, RULES)]


class Judged(NamedTuple):
    """A reading and what it makes of the claims in ``JUDGED``."""

    reading: Reading
    verdicts: Sequence[Verdict]

    @property
    def counts(self) -> Counter[str]:
        """How many claims have each verdict."""
        return Counter(verdict.verdict for verdict in self.verdicts)

    def __str__(self) -> str:
        known = len(self.verdicts) - self.counts["not run"]
        return f"{', '.join(self.reading)}: {self.counts['reproduced']} of {known}"


def judge_readings(records: Mapping[Path, Record]) -> list[Judged]:
    """Every reading, those first that reproduce the most claims; curves speak up to step ``K``.

    Args:
        records: of the recipes in ``READINGS``, and of the figures that they read.
    """

    @cache
    def about(figure: str, scaling: str, policy: str, theta: str) -> list[Verdict]:
        found = {
            folder: _as_the_figure(figure, record, policy, theta)
            for folder, record in records.items()
            if record.config["name"] in (figure, f"reading-{figure}-{scaling}")
            and record.config.get("scaling") == scaling
        }
        verdicts = judge_claims({folder: one for folder, one in found.items() if one})
        return [one for one in verdicts if one.id in JUDGED and one.id[0] == figure[-1]]

    judged = []
    for one in ALL:
        scalings = {"fig03": one.images, "fig04": one.points, "fig05": one.points}
        parts = [about(figure, s, one.policy, one.theta) for figure, s in scalings.items()]
        judged.append(Judged(one, [verdict for part in parts for verdict in part]))
    return sorted(judged, key=lambda one: -one.counts["reproduced"])


def _as_the_figure(figure: str, record: Record, policy: str, theta: str) -> Record | None:
    """The record of a reading as one of the figure's recipe; None if it has none of the methods.

    The figure's own runs have one policy and one theta, and Adam at other rates.
    """
    config, made, curves = record
    names = {"SGDnm": "SGDnm", "L2O": "L2O", "Adam 0.01": "Adam 0.01"}
    if config["name"] == figure:
        names |= {"GL2O (theta as decay)": "GL2O"} if theta == "decay" else {}
        names |= {"LGL2O": "LGL2O"} if policy == config.get("loser") else {}
    else:
        adam = "Adam 0.01" if figure == "fig05" else "Adam"  # as claims call it
        names |= {"Adam": adam, f"GL2O, {theta}": "GL2O", f"LGL2O, {policy}": "LGL2O"}
    chosen = curves.filter(pl.col("method").is_in([*names]), pl.col("step") <= K)
    recipe = PAPERS[figure]()
    if config.get("nc", recipe.nc) != recipe.nc:
        return None
    methods = [names[method] for method in config["methods"] if method in names]
    decided = {name: as_config(recipe)[name] for name in DECIDED}
    settings = config | decided | {"methods": methods}
    chosen = chosen.with_columns(pl.col("method").replace(names))
    return None if chosen.is_empty() else Record(settings, made, chosen)


def draw_readings(judged: Sequence[Judged]) -> Figure:
    """Each reading, a row, against each claim that a record can judge, a column."""
    columns = zip(*(one.verdicts for one in judged), strict=True)
    shown = [n for n, column in enumerate(columns) if {v.verdict for v in column} != {"not run"}]
    codes = [[[*COLORS].index(one.verdicts[n].verdict) for n in shown] for one in judged]
    figure = Figure(figsize=(9, 1.5 + 0.2 * len(judged)), layout="constrained")
    axes = figure.subplots()
    colors = ListedColormap([*COLORS.values()])
    axes.pcolormesh(np.array(codes), cmap=colors, vmin=0, vmax=len(COLORS) - 1, edgecolors="white")
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(shown)) + 0.5, [judged[0].verdicts[n].id for n in shown])
    axes.xaxis.tick_top()
    axes.set_yticks(np.arange(len(judged)) + 0.5, [str(one) for one in judged], fontsize=7)
    patches = [Patch(color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    axes.set_ylabel("Images, points, LSTM of the loser, theta: claims reproduced of those judged")
    axes.set_title("Joint readings of the paper: claims about figures 3, 4 and 5", fontsize=10)
    return figure
