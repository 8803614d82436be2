"""What tuned optimizers reach on published tasks, and how much sooner another one reaches it.

The published file is ``learned_optimization/baselines/data/speedup_over_multiple_baselines.json``
of google/learned_optimization (commit 32186aa). It holds the lowest loss at each number of steps
over Adam, Adam with two decays and RAdam, each at 15 rates.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..validation import one_of

FILE = "LOSSGUARD_BASELINES"
"""The environment variable that names the published file."""
EVERY = 10
"""Steps from one loss to the next."""
DECAY = 0.95
"""Of the smoothing."""


class Envelope(NamedTuple):
    """The losses of one task."""

    steps: np.ndarray
    """[points], increasing from 0 to 100,000."""
    loss: np.ndarray
    """[points], the mean of five seeds, smoothed as ``smoothed`` does it; it never rises."""

    def at(self, step: float) -> float:
        """The loss at a step."""
        return float(np.exp(np.interp(step, self.steps, np.log(self.loss))))

    def steps_to(self, loss: np.ndarray | float) -> np.ndarray:
        """Steps to a loss: 0 to one above the first or not finite, 100,000 at most."""
        with np.errstate(divide="ignore"):  # a loss of 0
            given = np.log(np.where(np.isfinite(loss), loss, np.inf))
        return np.interp(given, np.log(self.loss)[::-1], self.steps[::-1])


def envelope(task: str) -> Envelope:
    """The published envelope of a task.

    Args:
        task: a name of ``lossguard.tasks.published.PUBLISHED``.

    Raises:
        ValueError: if ``LOSSGUARD_BASELINES`` names no file, or there is no such task in it.
    """
    path = Path(os.environ.get(FILE, ""))
    if not path.is_file():
        raise ValueError(
            f"{FILE} must name the published file of baselines, got {str(path)!r}: "
            "speedup_over_multiple_baselines.json of google/learned_optimization"
        )
    content = json.loads(path.read_text())
    if task not in content:
        raise ValueError(f"task of an envelope must be {one_of(content, task)}")
    one = content[task]
    steps, loss = one.values() if isinstance(one, dict) else one
    return Envelope(np.array(steps, float), np.array(loss, float))


def smoothed(losses: np.ndarray) -> np.ndarray:
    """y <- 0.95 y + 0.05 loss along the last axis, from the first loss on: it lags 190 steps."""
    from scipy import signal  # takes a second to import, as all of SciPy

    losses = np.asarray(losses, float)
    made, _ = signal.lfilter([1 - DECAY], [1, -DECAY], losses, zi=DECAY * losses[..., :1])
    return made


class Mean(NamedTuple):
    """An interquartile mean."""

    value: float
    low: float
    """The 95 % interval of it, when seeds are drawn again with replacement within each task."""
    high: float


def interquartile_mean(scores: Sequence[np.ndarray], *, draws: int = 2_000) -> Mean:
    """The mean of the middle half of all scores (Agarwal et al., 2021, arXiv 2108.13264).

    As their package rliable computes it, which needs arch, pandas and seaborn beside SciPy.

    Args:
        scores: of each task, those of its seeds; of one seed there is no interval.
        draws: of the bootstrap.
    """
    from scipy import stats

    def middle(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
        return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)

    if min(map(len, scores)) < 2:
        return Mean(float(middle(*scores)), math.nan, math.nan)
    found = stats.bootstrap(
        tuple(scores), middle, n_resamples=draws, method="percentile", rng=np.random.default_rng(0)
    )
    return Mean(float(middle(*scores)), *map(float, found.confidence_interval))
