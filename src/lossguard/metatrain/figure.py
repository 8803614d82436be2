"""The outer loop's convergence, from its records: the style of the paper's figures 2 and 11."""

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..runs.drawing import log_losses, titled
from ..runs.records import Record, of_seeds


def draw(record: Record) -> Figure:
    """The losses of the outer loop, and the optimizee's at first and with the weights kept.

    Of a family of tasks losses are over a reference, and a third panel shows each held-out task.
    Of several meta-seeds (``of_seeds``) lines are means, and bands reach from the least to the
    largest.
    """
    config, made, curves = record
    runs = of_seeds(curves).values()
    steps = curves["meta_step"].unique(maintain_order=True).to_numpy()
    if any(len(one) != len(steps) for one in runs):
        raise ValueError("meta-seeds of a record must have the same meta-steps")
    training = np.array([one["meta_loss"] for one in runs])
    validation = np.array([one["validation"] for one in runs])
    names = [name for name in curves.columns if name.startswith("validation_")]
    panels = 3 if names else 2
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels)
    left, right = axes[:2]

    family = "family" in config  # whose training losses are logarithms
    loss = "loss over reference" if family else "loss"
    if not family:
        _line(left, steps, training, "training, all of a rollout")
    last = validation.shape[2]
    for first in sorted({0, min(50, max(0, last - 50)), max(0, last - 50)}):
        window = validation[:, :, first : first + 50]
        label = f"validation, steps {first + 1} to {first + window.shape[2]}"
        _line(left, steps, window.mean(axis=2), label)
    left.set(xlabel="Meta-step", ylabel=loss.capitalize())
    left.legend(fontsize=8)

    fresh = int(steps[0] == 0)  # which are not kept
    best = [fresh + kept(own[fresh:], select=config.get("select", True)) for own in validation]
    rows = validation[:, 0], np.array([own[b] for own, b in zip(validation, best, strict=True)])
    ends = " and ".join(str(step) for step in sorted({*steps[best]}))
    for losses, label in zip(rows, (steps[0], f"{ends}, kept"), strict=True):
        _line(right, np.arange(1, last + 1), losses, f"meta-step {label}")
    right.set(xlabel="Optimizer step", ylabel=f"Validation {loss}", xscale="log")
    right.legend(fontsize=8)
    for panel in (left, right):
        log_losses(panel)

    for name in names:
        losses = np.array([one[name] for one in runs])
        over_initial = losses[:, :, -10:].mean(axis=2) / losses[:, :, 0]
        _line(axes[2], steps, over_initial, name.removeprefix("validation_"))
    if names:
        axes[2].set(
            xlabel="Meta-step", ylabel=f"Mean of steps {max(1, last - 9)} to {last} / first"
        )
        axes[2].legend(fontsize=8)
    seeds = f", {len(runs)} meta-seeds" if len(runs) > 1 else ""
    title = titled(config["name"] + seeds, made.get("data"))
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _line(axes: Axes, x: np.ndarray, values: Float[np.ndarray, "seeds x"], label: str) -> None:
    """The mean over seeds, and the band of them."""
    (line,) = axes.plot(x, values.mean(axis=0), label=label, linewidth=1)
    if len(values) > 1:
        low, high, color = values.min(axis=0), values.max(axis=0), line.get_color()
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


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
