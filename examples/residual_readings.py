"""GL2O on the ConvNets of figures 6 and 7 by other rules: its numbers in the paper leave some open.

    lossguard run examples/residual_readings.py:mnist     # or cifar10

Each rule is a way to follow the residuals that were accepted, or to measure them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lossguard import (
    arithmetic_average,
    ema,
    pretrained,
    recent_max,
    recent_term,
    residual_guard,
)
from lossguard.experiments import Experiment
from lossguard.experiments.experiment import Methods, paper_methods, sgd_fallback, with_methods
from lossguard.experiments.recipes import fig06, fig07

READINGS: Mapping[str, Mapping[str, Any]] = {
    "EMA, theta as weight": {"sequence": ema(0.9)},
    "EMA, theta as decay": {"sequence": ema(0.1)},
    "RM": {"sequence": recent_max(30)},
    "RT": {"sequence": recent_term()},
    "AA": {"sequence": arithmetic_average()},
    "EMA of gradients": {"sequence": ema(0.9), "residual": "gradient"},
    "RM, alpha 1": {"sequence": recent_max(30), "alpha": 1.0},
}
"""Options of ``residual_guard``; the paper gives alpha = 0.99, theta = 0.9 and m = 30."""


def methods(e: Experiment) -> Methods:
    """SGDnm, L2O, and GL2O by each reading."""
    make = partial(residual_guard, pretrained(e.learned), sgd_fallback(e), nt=e.nt)
    paper = paper_methods(e)
    guards = {name: partial(make, **options) for name, options in READINGS.items()}
    return {name: paper[name] for name in ("SGDnm", "L2O")} | guards


def of(e: Experiment) -> Experiment:
    """An experiment with these methods."""
    name, title = f"{e.name}-residual", f"{e.title}: GL2O by other rules"
    return with_methods(methods, e, name=name, title=title, steps=1_000, seeds=3)


def mnist() -> Experiment:
    """Figure 6."""
    return of(fig06())


def cifar10() -> Experiment:
    """Figure 7."""
    return of(fig07())
