"""A grid of two settings, such as figure 10's, as a map of its losses."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from ..curves import mark_loss, over_seeds


class Heatmap(NamedTuple):
    """Methods named "SGDnm RATE tau TAU", of each rate with each time scale."""

    name: str
    rates: list[str]
    taus: list[str]

    def losses(self, curves: pl.DataFrame) -> tuple[int, np.ndarray]:
        """The last step that all reached, and Loss there [rates, taus], the mean over seeds."""
        last = int(curves.group_by("method", "seed").agg(pl.col("step").max())["step"].min())  # pyright: ignore
        loss = over_seeds(mark_loss(curves, last), "loss")
        rows = [[loss[f"{self.name} {rate} tau {tau}"] for tau in self.taus] for rate in self.rates]
        return last, np.array(rows, float)


def heatmap_of(methods: Sequence[str]) -> Heatmap | None:
    """The grid that these methods are, if they are a whole one."""
    found = [re.fullmatch(r"(.+) (\S+) tau (\S+)", method) for method in methods]
    parts = [match.groups() for match in found if match]
    names, rates, taus = ([*dict.fromkeys(part[i] for part in parts)] for i in range(3))
    whole = len(names) == 1 and min(len(rates), len(taus)) > 1
    one = Heatmap(names[0], rates, taus) if whole else None
    return one if one and len(rates) * len(taus) == len(parts) == len(methods) else None


def draw_heatmap(heatmap: Heatmap, curves: pl.DataFrame, title: str) -> Figure:
    """A map of the losses at the last step, with the numbers."""
    last, losses = heatmap.losses(curves)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(losses), cmap="Blues", aspect="auto")
    middle = np.mean(image.get_clim())
    for (row, column), loss in np.ndenumerate(losses):
        color = "white" if loss > middle else "black"
        axes.text(column, row, f"{loss:#.4g}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(heatmap.taus)), heatmap.taus, parse_math=False)
    axes.set_yticks(range(len(heatmap.rates)), heatmap.rates, parse_math=False)
    axes.set_xlabel("Time scale of the decay, in steps")
    axes.set_ylabel(f"Rate of {heatmap.name}", parse_math=False)
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.colorbar(image, label=f"Training loss at step {last:,}")
    return figure
