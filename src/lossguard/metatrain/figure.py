"""The outer loop's convergence, from its records: the style of the paper's figures 2 and 11."""

from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from ..drawing import log_losses, save, titled
from ..records import Record

OTHERS_STEPS = 100
"""The optimizer step at which losses on other data sets are compared, where the paper's rollouts
end."""


def plot(folder: Path, record: Record) -> Path:
    """Draw a meta-training run's figure into its folder, as PNG; returns the file."""
    return save(draw(record), folder)


def draw(record: Record) -> Figure:
    """The losses of the outer loop, and the optimizee's at first and with the weights kept.

    Where other data sets were validated on, as in figure 2, a third panel shows them.
    """
    config, made, curves = record
    steps = curves["meta_step"].to_numpy()
    validation = curves["validation"].to_numpy()
    others = on_others(curves)
    panels = 3 if others else 2
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels)
    left, right = axes[:2]

    if (curves["meta_loss"] > 0).all():  # not a logarithm
        left.plot(steps, curves["meta_loss"], label="training, all of a rollout", linewidth=1)
    last = validation.shape[1]
    for first in sorted({0, min(50, max(0, last - 50)), max(0, last - 50)}):
        window = validation[:, first : first + 50]
        label = f"validation, steps {first + 1} to {first + window.shape[1]}"
        left.plot(steps, window.mean(axis=1), label=label, linewidth=1)
    left.set(xlabel="Meta-step", ylabel="Loss")
    left.legend(fontsize=8)

    best = kept(validation, select=config.get("select", True))
    for row, label in ((0, f"meta-step {steps[0]}"), (best, f"meta-step {steps[best]}, kept")):
        right.plot(np.arange(1, validation.shape[1] + 1), validation[row], label=label, linewidth=1)
    right.set(xlabel="Optimizer step", ylabel="Validation loss", xscale="log")
    right.legend(fontsize=8)
    for panel in (left, right):
        log_losses(panel)

    for name, over_initial in others.items():
        axes[2].plot(steps, over_initial, label=name, linewidth=1)
    if others:
        last = min(OTHERS_STEPS, validation.shape[1])
        label = f"Validation loss at step {last} / first"
        axes[2].set(xlabel="Meta-step", ylabel=label)
        axes[2].legend(fontsize=8)
    title = titled(config["name"], made.get("data"))
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def kept(validation: np.ndarray, *, select: bool = True) -> int:
    """The check whose weights are kept: that of the least mean loss, or without ``select`` the last
    that is finite; the first if there is none.

    >>> losses = np.array([[3.0], [1.0], [2.0], [np.nan]])
    >>> kept(losses), kept(losses, select=False)
    (1, 2)
    """
    means = validation.mean(axis=1)
    if select:
        return int(np.argmin(np.where(np.isnan(means), np.inf, means)))
    return int(np.flatnonzero(np.isfinite(means))[-1]) if np.isfinite(means).any() else 0


def on_others(curves: pl.DataFrame) -> dict[str, np.ndarray]:
    """The loss up to ``OTHERS_STEPS`` over the initial one at each meta-step, by data set."""
    losses = {
        name.removeprefix("validation_"): curves[name].to_numpy()[:, :OTHERS_STEPS]
        for name in curves.columns
        if name.startswith("validation_")
    }
    return {name: loss[:, -10:].mean(axis=1) / loss[:, 0] for name, loss in losses.items()}
