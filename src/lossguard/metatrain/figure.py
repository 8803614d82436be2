"""The outer loop's convergence, from its records: the style of the paper's figures 2 and 11."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from ..records import read_run

OTHERS_STEPS = 100
"""After so many steps the losses on other data sets are compared: a rollout of the paper's."""


def plot(folder: Path) -> Path:
    """Draw a meta-training run's figure into its folder; returns the file.

    Where other data sets were validated on, as in figure 2, a third panel shows them.
    """
    config, _, curves = read_run(folder)
    steps = curves["meta_step"].to_numpy()
    validation = curves["validation"].to_numpy()
    others = [name for name in curves.columns if name.startswith("validation_")]
    panels = 3 if others else 2
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4), layout="constrained")
    left, right = axes[:2]

    left.plot(steps, curves["meta_loss"], label="training, all of a rollout", linewidth=1)
    last = validation.shape[1]
    for first in sorted({0, min(50, max(0, last - 50)), max(0, last - 50)}):
        window = validation[:, first : first + 50]
        label = f"validation, steps {first + 1} to {first + window.shape[1]}"
        left.plot(steps, window.mean(axis=1), label=label, linewidth=1)
    left.set(xlabel="Meta-step", ylabel="Loss", yscale="log")
    left.legend(fontsize=8)

    best = int(np.nanargmin(validation.mean(axis=1)))
    for row, label in ((0, f"meta-step {steps[0]}"), (best, f"meta-step {steps[best]}, kept")):
        right.plot(np.arange(1, validation.shape[1] + 1), validation[row], label=label, linewidth=1)
    right.set(xlabel="Optimizer step", ylabel="Validation loss", xscale="log", yscale="log")
    right.legend(fontsize=8)

    for name in others:
        losses = curves[name].to_numpy()[:, :OTHERS_STEPS]
        over_initial = losses[:, -10:].mean(axis=1) / losses[:, 0]
        axes[2].plot(steps, over_initial, label=name.removeprefix("validation_"), linewidth=1)
    if others:
        what = f"Validation loss up to step {OTHERS_STEPS}, over the initial one"
        axes[2].set(xlabel="Meta-step", ylabel=what)
        axes[2].legend(fontsize=8)
    figure.suptitle(config["name"], fontsize=10)

    file = folder / "figure.png"
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file
