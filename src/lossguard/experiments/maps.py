"""Heat maps of two records put together from many runs: readings of the paper, and its grids."""

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..records import Record
from .grids import CHOSEN, losses_of, over_best
from .readings import judge_readings

COLORS = {"reproduced": "#4a90c4", "not reproduced": "#e8a078", "not run": "#eeeeee"}
"""Of verdicts."""


def draw_readings(record: Record) -> Figure:
    """Each reading of the paper, a row, against each claim that the record can judge, a column."""
    judged = judge_readings(record)
    columns = zip(*(one.verdicts for one in judged), strict=True)
    shown = [n for n, column in enumerate(columns) if {v.verdict for v in column} != {"not run"}]
    codes = [[[*COLORS].index(one.verdicts[n].verdict) for n in shown] for one in judged]
    figure = Figure(figsize=(9, 1.5 + 0.2 * len(judged)), layout="constrained")
    axes = figure.subplots()
    colors = ListedColormap([*COLORS.values()])
    axes.imshow(np.array(codes), cmap=colors, vmin=0, vmax=len(COLORS) - 1, aspect="auto")
    axes.set_xticks(range(len(shown)), [judged[0].verdicts[n].id for n in shown])
    axes.xaxis.tick_top()
    rows = []
    for one in judged:
        r, counts = one.reading, one.counts()
        known = counts["reproduced"] + counts["not reproduced"]
        rows.append(f"{', '.join(r)}: {counts['reproduced']} of {known}")
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color="white", linewidth=1)
    for x in range(1, len(shown)):
        axes.axvline(x - 0.5, color="white", linewidth=1)
    patches = [Patch(color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    axes.set_ylabel("Images, points, LSTM of the loser, theta: claims reproduced of those judged")
    axes.set_title(record.config["title"], fontsize=10, parse_math=False)
    return figure


def draw_grids(record: Record) -> Figure:
    """Each task in each scaling, a row: losses over the best of the same optimizer.

    What the paper's grids chose is boxed; what was not run is empty.
    """
    rows = losses_of(record)
    found = [over_best(losses) for losses in rows.values()]
    methods = [*dict.fromkeys(method for row in found for method in row)]
    ratios = np.array([[row.get(method, np.nan) for method in methods] for row in found])
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.log10(ratios), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), ratio in np.ndenumerate(ratios):
        color, weight = "white" if ratio > 3 else "black", "bold" if ratio == 1 else "normal"
        text = f"{ratio:.3g}" if np.isfinite(ratio) else ""
        axes.text(x, y, text, ha="center", va="center", color=color, weight=weight, fontsize=8)
    for y, (task, _) in enumerate(rows):
        for chosen in CHOSEN[task]:
            corner = methods.index(chosen) - 0.5, y - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="C3", linewidth=1.5))
    axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [" ".join(key) for key in rows], fontsize=8)
    axes.set_title(record.config["title"], fontsize=10, parse_math=False)
    return figure


MAPS: Mapping[str, Callable[[Record], Figure]] = {"readings": draw_readings, "grids": draw_grids}
"""By the name of the record."""
